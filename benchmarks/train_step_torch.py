"""Times the training step of Hugging Face's detectors for train_step.py, which says what is measured.

    python benchmarks/train_step_torch.py --machine
    python benchmarks/train_step_torch.py --batches=FILE --model='{"name": "detr", ...}' --mode=compiled

Needs torch, transformers, scipy and Pillow; nothing of this package, no weights, no network. Prints one line of JSON.
Backbone normalisation, losses and matching are those of transformers.
"""

import argparse
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np

try:
    import PIL  # noqa: F401  without it transformers does not import its losses
    import scipy  # noqa: F401  its matching
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"{sys.executable} has no {error.name}")

MODES = ("eager", "channels_last", "compiled")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BACKBONE_RATE, RATE, WEIGHT_DECAY, CLIP_NORM = 1e-5, 1e-4, 1e-4, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--batches")
    parser.add_argument("--model", type=json.loads)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--precision", choices=("bfloat16", "float32"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    if arguments.machine:
        print(json.dumps(machine()))
    else:
        print(json.dumps(measure(arguments)))


def machine() -> dict:
    return {
        "platform": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def measure(arguments: argparse.Namespace) -> dict:
    """Times in seconds a step, sizes in bytes."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing, as JAX's default
    device = torch.device(arguments.device)
    batches = [to_device(batch, device) for batch in read_batches(arguments.batches)]
    model = build_model(**arguments.model).to(device).train()
    if arguments.mode != "eager":
        model = model.to(memory_format=torch.channels_last)
    if arguments.mode == "compiled":
        model.model.compile()  # all but the heads and the losses, whose matching leaves the device
    step = make_step(model, arguments.precision, device, channels_last=arguments.mode != "eager")

    start = time.perf_counter()
    losses = [step(batch) for batch in {batch[0].shape: batch for batch in batches}.values()]
    losses = torch.stack(losses).tolist()
    compile_seconds = time.perf_counter() - start
    if not all(map(math.isfinite, losses)):
        sys.exit(f"the loss is {losses} in steps of random images, so their time means nothing")

    steps = math.ceil(arguments.steps / len(batches)) * len(batches)
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.rounds):
        synchronize(device)
        start = time.perf_counter()
        for i in range(steps):
            step(batches[i % len(batches)])
        synchronize(device)
        times.append((time.perf_counter() - start) / steps)
    return {
        "implementation": f"transformers, {arguments.mode.replace('_', ' ')}",
        "seconds": statistics.median(times),
        "fastest": min(times),
        "loss": losses[0],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "compile_seconds": compile_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident_bytes(),
    }


def peak_resident_bytes() -> int:
    """Of this process; what getrusage tells on Linux may be of the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def build_model(name: str, depth: int, classes: int, frozen_stages: int, **fields) -> torch.nn.Module:
    """The detector with random parameters; `fields` are those of its transformers config."""
    outputs = ["stage4"] if name == "detr" or fields["num_feature_levels"] == 1 else ["stage2", "stage3", "stage4"]
    wide = 4 if depth >= 50 else 1
    backbone = transformers.ResNetConfig(
        depths=list(STAGES[depth]),
        hidden_sizes=[64 * 2**i * wide for i in range(4)],
        layer_type="bottleneck" if depth >= 50 else "basic",
        out_features=outputs,
    )
    kinds = {
        "detr": (transformers.DetrConfig, transformers.DetrForObjectDetection),
        "deformable_detr": (transformers.DeformableDetrConfig, transformers.DeformableDetrForObjectDetection),
    }
    make_config, make_model = kinds[name]
    config = make_config(
        use_timm_backbone=False,
        backbone_config=backbone,
        auxiliary_loss=True,
        num_labels=classes,
        **fields,
    )
    config._attn_implementation = {"": "sdpa", "backbone_config": "eager"}  # convolutions attend to nothing
    model = make_model(config)
    # transformers 5.24 looks for "stage.1" among names that have "stages.1", and so trains nothing of its own ResNet.
    for parameter_name, parameter in model.model.backbone.named_parameters():
        stage = re.search(r"\.stages\.(\d)\.", parameter_name)
        parameter.requires_grad_((int(stage[1]) + 2 if stage else 1) > frozen_stages)  # the stem is the first
    return model


def make_step(model: torch.nn.Module, precision: str, device: torch.device, *, channels_last: bool):
    """batch -> loss, of a whole step: pixels made floats, forward, matching, losses, backward, clipping, AdamW."""
    backbone = [p for name, p in model.named_parameters() if "backbone" in name and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if "backbone" not in name and p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": backbone, "lr": BACKBONE_RATE}, {"params": rest}],
        lr=RATE,
        weight_decay=WEIGHT_DECAY,
        fused=True if device.type == "cuda" else None,
    )
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))

    def step(batch) -> torch.Tensor:
        image, pixel_mask, labels = batch
        pixels = (image.permute(0, 3, 1, 2).float() / 255 - mean) / std * pixel_mask[:, None]
        pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(pixel_values=pixels, pixel_mask=pixel_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone + rest, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def read_batches(path: str) -> list[dict[str, np.ndarray]]:
    with np.load(path) as file:
        names = sorted({name.split("/")[0] for name in file.files}, key=int)
        fields = {name.split("/")[1] for name in file.files}
        return [{field: file[f"{name}/{field}"] for field in fields} for name in names]


def to_device(batch: dict[str, np.ndarray], device: torch.device):
    """(uint8 image [B, H, W, 3], pixel mask [B, H, W], labels of each image as transformers takes them)."""
    _, height, width, _ = batch["image"].shape
    bottom, right = batch["size"][:, 0, None, None], batch["size"][:, 1, None, None]
    mask = (np.arange(height)[None, :, None] < bottom) & (np.arange(width)[None, None] < right)
    labels = [
        {
            "class_labels": torch.tensor(labels[valid], dtype=torch.int64, device=device),
            "boxes": torch.tensor(boxes[valid], device=device),
        }
        for labels, boxes, valid in zip(batch["labels"], batch["boxes"], batch["box_valid"], strict=True)
    ]
    return torch.tensor(batch["image"], device=device), torch.tensor(mask, dtype=torch.int64, device=device), labels


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

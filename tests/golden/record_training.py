"""Runs the official programs on the cases of cases.py and writes the golden training files. Needs PyTorch, not JAX.

    python tests/golden/record_training.py --detr=/path/to/facebookresearch/detr \
        --deformable_detr=/path/to/fundamentalvision/Deformable-DETR \
        --deperceiver=/path/to/mooey5775/DePerceiver --smca=/path/to/gaopengcuhk/SMCA-DETR \
        --smca_multiscale=/path/to/unpacked/Multi_scale_SMCA [--only=detr_r50]

torchvision and pytorch_lightning are imported by the official code and must be importable; README.md says which parts
of them matter. Each case runs twice, in float32 and in float64; the second is the measure of the first's rounding.
"""

import argparse
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import cases
import numpy as np
import torch

SINGLE, DOUBLE = torch.float32, torch.float64
SEEDED = Path(__file__).resolve().parents[1] / "seeded.py"
seeded_array = runpy.run_path(str(SEEDED))["seeded_array"]  # alone: its package would import JAX


def stub(**modules) -> None:
    """Empty modules for what the official programs import and parity does not use (data sets, loops, loggers)."""
    for name, attributes in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[module.__name__] = module


def build_detr(arguments):
    """(model, criterion, post-processor) by the official functions."""
    stub(datasets=["build_dataset", "get_coco_api_from_dataset"], engine=["evaluate", "train_one_epoch"])
    import main
    from models import build_model

    args = main.get_args_parser().parse_args([*arguments, "--device", "cpu"])
    model, criterion, post = build_model(args)
    return model, criterion, post["bbox"], args


def build_deformable_detr(arguments):
    """The same for Deformable DETR; its formula in PyTorch stands in for the compiled operator."""
    stub(
        datasets=["build_dataset", "get_coco_api_from_dataset"],
        datasets__samplers=[],
        engine=["evaluate", "train_one_epoch"],
        MultiScaleDeformableAttention=[],
    )
    import main
    import torchvision
    from models import backbone, build_model
    from models.ops.functions import ms_deform_attn_func
    from models.ops.modules import ms_deform_attn

    def attend(value, sizes, start, location, weight, step):
        sizes = [(int(height), int(width)) for height, width in sizes]
        return ms_deform_attn_func.ms_deform_attn_core_pytorch(value, sizes, location, weight)

    class Backbone(backbone.BackboneBase):
        """The official one without its refusal of ResNets that have a quarter of the channels."""

        def __init__(self, name, train_backbone, return_interm_layers, dilation):
            norm, dilated = backbone.FrozenBatchNorm2d, [False, False, dilation]
            body = getattr(torchvision.models, name)(replace_stride_with_dilation=dilated, norm_layer=norm)
            super().__init__(body, train_backbone, return_interm_layers)
            self.num_channels = [channels // 4 if name == "resnet18" else channels for channels in self.num_channels]

    ms_deform_attn.MSDeformAttnFunction = types.SimpleNamespace(apply=attend)
    backbone.Backbone = Backbone
    args = main.get_args_parser().parse_args([*arguments, "--device", "cpu"])
    model, criterion, post = build_model(args)
    return model, criterion, post["bbox"], args


def build_deperceiver(arguments):
    """The same for DePerceiver, put together as its main_naive.py does."""
    stub(
        pytorch_lightning__callbacks=["LearningRateMonitor", "ModelCheckpoint"],
        pytorch_lightning__loggers=["WandbLogger"],
        pytorch_lightning__plugins=["DDPPlugin"],
        deperceiver__datamodules=["get_coco_api_from_dataset"],
        deperceiver__datamodules__coco_datamodule=["CocoDataModule"],
        deperceiver__metrics__coco_eval=["CocoEvaluator"],
    )
    lightning = sys.modules.get("pytorch_lightning") or __import__("pytorch_lightning")
    lightning.Trainer = lightning.seed_everything = None
    import main_naive as program

    args = program.get_args_parser().parse_args([*arguments, "--device", "cpu"])
    widths = dict(latent_dim=256, query_dim=256)
    encoder = program.PerceiverEncoder(
        num_latents=args.num_latents,
        latent_dim=256,
        input_dim=256,
        num_self_attn_per_block=args.enc_layers_per_block,
        num_blocks=args.enc_blocks,
        num_cross_attn_heads=1,
        num_self_attn_heads=8,
        cross_attn_widening_factor=1,
        self_attn_widening_factor=1,
    )
    if args.aux_loss:
        decoder = program.PerceiverMultipleDecoder(**widths, num_layers=args.dec_layers, return_intermediate=True)
    else:
        decoder = program.PerceiverDecoder(**widths)
    weights = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    if args.aux_loss:
        weights |= {f"{name}_{i}": weight for i in range(args.dec_layers - 1) for name, weight in weights.items()}
    criterion = program.SetCriterion(
        91, program.build_matcher(args), weights, args.eos_coef, ["labels", "boxes", "cardinality"]
    )
    perceiver = program.PerceiverIO(encoder, decoder)
    model = program.NaiveDePerceiver(program.build_backbone(args), perceiver, criterion, 91, args.num_queries, args)
    return model, criterion, model.postprocess, args


def build_smca(arguments):
    """The same for SMCA's single-scale model."""
    stub(datasets=["build_dataset", "get_coco_api_from_dataset"], engine=["evaluate", "train_one_epoch"])
    import main
    from models import build_model

    args = main.get_args_parser().parse_args([*arguments, "--device", "cpu"])
    model, criterion, post = build_model(args)
    official = model.forward
    model.forward = lambda samples: official([samples, image_sizes(samples)])
    return model, criterion, in_order_of_labels(post["bbox"]), args


def build_smca_multiscale(arguments):
    """The same for the multi-scale model in its archive, with the transformer that was trained.

    One image at a time: in a batch all images would get the scale attention of the first.
    """
    import importlib.util
    import pdb

    pdb.set_trace = lambda: None  # there is one in the backbone
    # Its models/detr.py imports a newer transformer.py than that of the published figures.
    name, file = "models.transformer", Path(sys.path[0]) / "models/transformer_44_dot_4.py"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    model, criterion, post, args = build_smca(arguments)
    whole_batch = model.forward
    nested_tensor = sys.modules[type(model).__module__].NestedTensor

    def forward(samples):
        images = [slice(b, b + 1) for b in range(len(samples.tensors))]
        answers = [layers_of(whole_batch(nested_tensor(samples.tensors[b], samples.mask[b]))) for b in images]
        layers = [
            {key: torch.cat([image[key] for image in images]) for key in ("pred_logits", "pred_boxes")}
            for images in zip(*answers, strict=True)
        ]
        return {**layers[-1], "aux_outputs": layers[:-1]}

    model.forward = forward
    return model, criterion, post, args


def image_sizes(samples) -> list[dict[str, torch.Tensor]]:
    """The (height, width) of each image without padding, where the official program has it: in the targets."""
    real = ~samples.mask
    return [{"size": torch.stack([mask.any(1).sum(), mask.any(0).sum()])} for mask in real]


def in_order_of_labels(postprocess):
    """The official post-processing, whose order is that of `torch.topk`, with detections by label, then left edge."""

    def ordered(outputs, sizes):
        detections = postprocess(outputs, sizes)
        orders = [np.lexsort((d["boxes"][:, 0].numpy(), d["labels"].numpy())) for d in detections]
        return [{key: x[order.copy()] for key, x in d.items()} for d, order in zip(detections, orders, strict=True)]

    return ordered


def first_names(model) -> dict[int, str]:
    """{address: name} of all tensors that a checkpoint holds; of those that it holds several times, the first name."""
    names = {}
    for name, tensor in sorted(model.state_dict().items()):
        names.setdefault(tensor.data_ptr(), name)
    return names


def fill(model, dtype, case) -> None:
    """Every parameter and buffer that a checkpoint of the model holds, from the generator keyed by its first name."""
    model.to(dtype)
    names = first_names(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            name = names[tensor.data_ptr()]
            if not name.startswith("criterion."):
                tensor.copy_(torch.from_numpy(seeded_array(name, tuple(tensor.shape), case.seed(name))))


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    """By their first names, each once."""
    names = first_names(model)
    return {names[p.data_ptr()]: p for p in model.parameters() if p.requires_grad}


def parameter_groups(trained, args) -> list[dict]:
    """As the official programs make them: those of DETR and DePerceiver know only the backbone."""
    backbone = getattr(args, "lr_backbone_names", ["backbone"])
    points = getattr(args, "lr_linear_proj_names", [])

    def group(name):
        return next((i for i, parts in enumerate((backbone, points)) if any(part in name for part in parts)), 2)

    rates = [args.lr_backbone, args.lr * getattr(args, "lr_linear_proj_mult", 1.0), args.lr]
    return [{"params": [p for name, p in trained.items() if group(name) == i], "lr": rates[i]} for i in range(3)]


def inputs(case, step, dtype, nested_tensor):
    """(images with masks, targets, original sizes) of a batch, as the official model and loss take them."""
    fields = cases.batch(case, step)
    real = np.float32 if dtype == SINGLE else np.float64
    mean, std = np.array([0.485, 0.456, 0.406], real), np.array([0.229, 0.224, 0.225], real)
    image = (fields["image"].astype(real) / real(255) - mean) / std
    padding = np.ones(image.shape[:3], bool)
    for b, (height, width) in enumerate(fields["size"]):
        padding[b, :height, :width] = False
    image[padding] = 0
    samples = nested_tensor(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).to(dtype), torch.from_numpy(padding))
    targets = [
        {"boxes": torch.from_numpy(boxes[valid]).to(dtype), "labels": torch.from_numpy(labels[valid].astype(np.int64))}
        for boxes, labels, valid in zip(fields["boxes"], fields["labels"], fields["box_valid"], strict=True)
    ]
    return samples, targets, torch.from_numpy(fields["original_size"].astype(np.int64))


def layers_of(outputs):
    """Decoder layers, the last one last."""
    return [*outputs.get("aux_outputs", []), {key: outputs[key] for key in ("pred_logits", "pred_boxes")}]


def assignment(criterion, outputs, targets) -> np.ndarray:
    """The query of every box slot in every layer [L, B, N], -1 in empty slots; last, the token of each proposal."""
    matched = [(output, targets) for output in layers_of(outputs)]
    if "enc_outputs" in outputs:
        any_object = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        matched.append((outputs["enc_outputs"], any_object))
    query = np.full((len(matched), len(targets), cases.MAX_BOXES), -1, np.int16)
    for layer, pair in enumerate(matched):
        for b, (queries, boxes) in enumerate(criterion.matcher(*pair)):
            query[layer, b, boxes.numpy()] = queries.numpy()
    return query


def proposals(outputs, num_queries) -> dict[str, np.ndarray]:
    """Scores and boxes of all tokens, and the tokens that become queries, best first; nothing without two stages."""
    if "enc_outputs" not in outputs:
        return {}
    logits, boxes = (outputs["enc_outputs"][key] for key in ("pred_logits", "pred_boxes"))
    chosen = torch.topk(logits[..., 0], num_queries, dim=1)[1]
    return {"proposal_logits": logits.numpy(), "proposal_boxes": boxes.numpy(), "chosen": chosen.numpy()}


def run(case, build, dtype) -> dict[str, np.ndarray]:
    """Five optimiser steps without dropout, as the official loops take them; everything that is compared."""
    if dtype == DOUBLE:  # everywhere, also where the official code says float32: positions, masks
        torch.float32 = DOUBLE
        torch.Tensor.float = torch.Tensor.double
        torch.set_default_dtype(DOUBLE)
    model, criterion, postprocess, args = build([*case.official, f"--lr_drop={cases.DROP_EVERY}"])
    criterion.to(dtype)
    fill(model, dtype, case)
    model.eval()  # only dropout knows the difference: the batch norms are frozen
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameter_groups(trained, args), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    nested_tensor = sys.modules[type(model).__module__].NestedTensor
    result, losses = {}, []
    for step in range(cases.STEPS):
        samples, targets, original_size = inputs(case, step, dtype, nested_tensor)
        outputs = model(samples)
        terms = criterion(outputs, targets)
        loss = sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            with torch.no_grad():
                layers = layers_of(outputs)
                detections = postprocess(outputs, original_size)
                result |= {
                    "logits": torch.stack([layer["pred_logits"] for layer in layers]).numpy(),
                    "boxes": torch.stack([layer["pred_boxes"] for layer in layers]).numpy(),
                    "query": assignment(criterion, outputs, targets),
                    **proposals(outputs, args.num_queries),
                    "term_names": np.array(sorted(terms)),
                    "terms": np.array([float(terms[name]) for name in sorted(terms)]),
                    **{
                        f"detections_{key}": np.stack([d[key].numpy() for d in detections])
                        for key in ("scores", "labels", "boxes")
                    },
                }
            gradients = {name: p.grad.numpy() for name, p in trained.items()}
            result["parameter_names"] = np.array(list(gradients))
            result["gradient_norms"] = np.array([np.linalg.norm(g.astype(np.float64)) for g in gradients.values()])
            result["gradients"] = np.stack([cases.project(name, g) for name, g in gradients.items()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
        optimizer.step()
        schedule.step()  # an epoch is one step here
        if step == 0:
            result["updated"] = np.stack([cases.sample(name, p.detach().numpy()) for name, p in trained.items()])
    return result | {"losses": np.array(losses)}


def record(name: str, build) -> None:
    single, double = (run(cases.CASES[name], build, dtype) for dtype in (SINGLE, DOUBLE))
    for key in ("query", "detections_labels", "chosen"):
        if key in single and not np.array_equal(single[key], double[key]):
            raise SystemExit(f"{name}: {key} differs between float32 and float64; choose other inputs.")
    keep = {key: single[key] for key in ("query", "term_names", "parameter_names", "gradient_norms")}
    keep |= {key: single[key] for key in single if key.startswith("detections_")}
    stride = cases.CASES[name].query_stride
    keep["boxes"] = single["boxes"][:, :, ::stride]
    keep["logits"] = single["logits"][-1, :, ::stride]
    keep["auxiliary_logits"] = single["logits"][:-1, :, :: stride * cases.QUERY_STRIDE]
    if "chosen" in single:
        keep["chosen"] = single["chosen"].astype(np.int16)
        keep |= {key: single[key][:, :: cases.PROPOSAL_STRIDE] for key in ("proposal_logits", "proposal_boxes")}
    for key in ("terms", "gradients", "updated", "losses"):
        keep[key] = single[key].astype(np.float32)
        keep[f"{key}_float64"] = double[key]
    for key in {"logits", "boxes", "proposal_logits", "proposal_boxes"} & single.keys():
        keep[f"{key}_noise"] = np.max(np.abs(single[key] - double[key]))
    path = Path(__file__).parent / f"training_{name}.npz"
    np.savez_compressed(path, **keep)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB, loss {single['losses']}", flush=True)
    for key in ("logits", "boxes", "terms", "losses"):
        print(f"  {key}: float32 - float64 {np.max(np.abs(single[key] - double[key])):.2e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detr", type=Path)
    parser.add_argument("--deformable_detr", type=Path)
    parser.add_argument("--deperceiver", type=Path)
    parser.add_argument("--smca", type=Path, help="gaopengcuhk/SMCA-DETR")
    parser.add_argument("--smca_multiscale", type=Path, help="the folder in its Multi_scale_SMCA.zip, unpacked")
    parser.add_argument("--only", choices=cases.CASES)
    args = parser.parse_args()
    if args.only is None:
        for name in cases.CASES:  # a process for each, because the official programs use the same module names
            subprocess.run([sys.executable, *sys.argv, f"--only={name}"], check=True)
        return
    case = cases.CASES[args.only]
    smca = (args.smca, build_smca)
    if case.config == "smca:r50_multiscale_conv":
        smca = (args.smca_multiscale, build_smca_multiscale)
    source, build = {
        "detr": (args.detr, build_detr),
        "deformable_detr": (args.deformable_detr, build_deformable_detr),
        "deperceiver": (args.deperceiver, build_deperceiver),
        "smca": smca,
    }[case.family]
    sys.path.insert(0, str(source))
    with tempfile.TemporaryDirectory() as directory:
        # DePerceiver's loss sums its box count over processes and fails without a process group.
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=0, world_size=1)
        record(args.only, build)


if __name__ == "__main__":
    main()

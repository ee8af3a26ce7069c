"""Runs torchvision's parts of backbones and writes backbone.npz. Needs PyTorch and torchvision, not JAX.

    python tests/golden/record_backbone.py
    python tests/golden/record_backbone.py --whole=resnext101_64x4d --output=/tmp/x101   # or a timm model: timm/NAME

The second writes, of a whole network with seeded weights, weights.safetensors, and maps and gradients in answers.npz,
which `python -m tests.backbone_parity` compares. They are too large for the repository.
"""

import argparse
import runpy
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.models.resnet import Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d

HERE = Path(__file__).resolve().parent
seeded_state_dict = runpy.run_path(str(HERE.parent / "seeded.py"))["seeded_state_dict"]  # alone: its package needs JAX


def draw(rng, *shape) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).requires_grad_()


def gradients(rng, y: torch.Tensor, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
    """The result, what it is multiplied with, and the gradients of that sum."""
    cotangent = draw(rng, *y.shape)
    found = torch.autograd.grad(y, list(inputs.values()), cotangent.detach())
    arrays = {"y": y, "cotangent": cotangent, **{f"of_{name}": g for name, g in zip(inputs, found, strict=True)}}
    return {name: array.detach().numpy() for name, array in arrays.items()}


def resnext_stage(rng) -> dict[str, np.ndarray]:
    """Two bottlenecks of stride 2 and 1, from 16 to 32 channels; 3x3 convolutions of 16 channels in four groups."""
    make_norm = FrozenBatchNorm2d
    how = dict(groups=4, base_width=32, norm_layer=make_norm)  # 8 / 64 * 32 channels a group
    shortcut = torch.nn.Sequential(conv1x1(16, 32, stride=2), make_norm(32))
    first, second = Bottleneck(16, 8, stride=2, downsample=shortcut, **how), Bottleneck(32, 8, **how)
    stage = torch.nn.Sequential(first, second)
    seeded = seeded_state_dict({f"layer2.{name}": tuple(x.shape) for name, x in stage.state_dict().items()})
    stage.load_state_dict({name[7:]: torch.from_numpy(array) for name, array in seeded.items()})
    x = draw(rng, 2, 16, 9, 12)
    inputs = {"x": x, **{f"layer2.{name}": kernel for name, kernel in stage.double().named_parameters()}}
    return {"x": x.detach().numpy(), **gradients(rng, stage(x), **inputs)}


def deformable(rng, *, stride: int, dilation: int, groups: int, offsets: str) -> dict[str, np.ndarray]:
    """A 3x3 convolution of 4 to 6 channels; offsets of up to several cells, or none, where bilinear has its kinks."""
    rows, columns = ((n + stride - 1) // stride for n in (7, 9))
    x, kernel, offset, mask = (
        draw(rng, 2, 4, 7, 9),
        draw(rng, 6, 4 // groups, 3, 3),
        draw(rng, 2, 18, rows, columns),
        draw(rng, 2, 9, rows, columns),
    )
    with torch.no_grad():
        offset *= 3 if offsets == "far" else 0
    y = deform_conv2d(x, offset, kernel, stride=stride, padding=dilation, dilation=dilation, mask=mask)
    inputs = {"x": x, "kernel": kernel, "offset": offset, "mask": mask}
    drawn = {name: array.detach().numpy() for name, array in inputs.items()}
    return {**drawn, **gradients(rng, y, **inputs)}


def whole(name: str, output: Path) -> None:
    """The four maps of an image, and gradients of every kernel of their product with random numbers, in float64."""
    from safetensors.numpy import save_file

    if name.startswith("timm/"):
        import timm

        network = timm.create_model(name.removeprefix("timm/")).eval()
    else:
        network = torchvision.models.get_model(name, norm_layer=FrozenBatchNorm2d)
    shapes = {n: tuple(x.shape) for n, x in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    state = seeded_state_dict(shapes)
    network.load_state_dict({n: torch.from_numpy(x) for n, x in state.items()}, strict=False)
    network.double()
    rng = np.random.default_rng(3)
    image = draw(rng, 1, 3, 97, 131)
    x, maps = network.maxpool(torch.relu(network.bn1(network.conv1(image)))), []
    for stage in range(1, 5):
        x = getattr(network, f"layer{stage}")(x)
        maps.append(x)
    cotangents = [draw(rng, *x.shape) for x in maps]
    kernels = {n: x for n, x in network.named_parameters() if n.startswith("layer") and x.ndim == 4}
    found = torch.autograd.grad(maps, list(kernels.values()), [x.detach() for x in cotangents])
    arrays = {"image": image, **{f"gradient/{n}": g for n, g in zip(kernels, found, strict=True)}}
    for i, (x, cotangent) in enumerate(zip(maps, cotangents, strict=True)):
        arrays |= {f"map/{4 * 2**i}": x, f"cotangent/{4 * 2**i}": cotangent}
    output.mkdir(parents=True, exist_ok=True)
    save_file(state, output / "weights.safetensors")
    np.savez(output / "answers.npz", **{n: x.detach().numpy() for n, x in arrays.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", help="a network of torchvision, or timm/NAME")
    parser.add_argument("--output", type=Path, help="the folder for its weights and answers")
    args = parser.parse_args()
    if args.whole:
        if args.output is None:
            parser.error("--whole needs --output")
        raise SystemExit(whole(args.whole, args.output))
    rng = np.random.default_rng(20261129)
    cases = {
        "resnext_stage": resnext_stage(rng),
        "deformable": deformable(rng, stride=1, dilation=1, groups=1, offsets="far"),
        "deformable_stride": deformable(rng, stride=2, dilation=1, groups=2, offsets="far"),
        "deformable_dilation": deformable(rng, stride=1, dilation=2, groups=2, offsets="far"),
        "deformable_start": deformable(rng, stride=2, dilation=1, groups=1, offsets="none"),
    }
    arrays = {f"{case}/{name}": array for case, found in cases.items() for name, array in found.items()}
    np.savez_compressed(HERE / "backbone.npz", **{n: a.astype(np.float32) for n, a in arrays.items()})

"""Runs torchvision's parts of backbones and writes backbone.npz. Needs PyTorch and torchvision, not JAX.

python tests/golden/record_backbone.py
"""

import runpy
from pathlib import Path

import numpy as np
import torch
from torchvision.models.resnet import Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

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


if __name__ == "__main__":
    rng = np.random.default_rng(20261129)
    cases = {"resnext_stage": resnext_stage(rng)}
    arrays = {f"{case}/{name}": array for case, found in cases.items() for name, array in found.items()}
    np.savez_compressed(HERE / "backbone.npz", **{n: a.astype(np.float32) for n, a in arrays.items()})

"""A whole backbone beside torchvision's or timm's, whose weights and answers golden/record_backbone.py --whole wrote.

python -m tests.backbone_parity --answers=/tmp/x101 --depth=101 --groups=64 --inner_ratio=4 [--double]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deperceiver_jax.models.features.resnet import STRIDES, ResNet
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.weights.backbone import load_backbone
from deperceiver_jax.weights.name_rules import NameRules, to_torch
from deperceiver_jax.weights.tables.parts import resnet_rules


def compare(folder: Path, dtype, **fields) -> tuple[float, float]:
    """(largest difference of a map over its largest value, largest relative norm of the error of a gradient)."""

    def make():
        how: dict = dict(norm="frozen_batch_norm", frozen_stages=1, dilation=False, deformable_stages=0)
        compute = Compute(dtype, attention="auto", rematerialize=False)
        return ResNet(width=64, strides=STRIDES, **how, **fields, compute=compute, rngs=nnx.Rngs(0))

    skeleton, params, others = take_apart(nnx.eval_shape(make))
    shapes = {f"backbone/{path}": x.shape for path, x in {**params, **others}.items()}
    loaded = load_backbone(folder / "weights.safetensors", shapes)
    arrays = {path.removeprefix("backbone/"): jnp.asarray(x, dtype) for path, x in loaded.items()}
    answers = np.load(folder / "answers.npz")
    image, *cotangents = (
        jnp.asarray(answers[name].transpose(0, 2, 3, 1), dtype)
        for name in ("image", *(f"cotangent/{stride}" for stride in STRIDES))
    )

    @jax.jit
    def maps_and_gradients(trained):
        def features(trained):
            return skeleton.merge({**arrays, **trained})(image)

        maps, backward = jax.vjp(features, trained)
        return maps, *backward(dict(zip(STRIDES, cotangents, strict=True)))

    maps, gradients = maps_and_gradients({path: arrays[path] for path in params})
    of_maps = []
    for stride in STRIDES:
        theirs = answers[f"map/{stride}"].transpose(0, 2, 3, 1)
        of_maps.append(np.abs(maps[stride] - theirs).max() / np.abs(theirs).max())
    of_gradients = []
    rules = NameRules(tuple(resnet_rules()))
    for name, ours in to_torch({path: np.asarray(x) for path, x in gradients.items()}, rules).items():
        theirs = answers[f"gradient/{name}"]
        of_gradients.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return float(max(of_maps)), float(max(of_gradients))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="the folder that record_backbone.py wrote")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--inner_ratio", type=int, default=1)
    parser.add_argument("--double", action="store_true", help="in float64")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", args.double)
    sizes = dict(depth=args.depth, groups=args.groups, inner_ratio=args.inner_ratio)
    of_maps, of_gradients = compare(args.answers, jnp.float64 if args.double else jnp.float32, **sizes)
    print(f"maps {of_maps:.1e}, gradients {of_gradients:.1e}")

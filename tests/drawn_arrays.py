"""For tests: detectors as they start and with parameters drawn at random, and the levels of their tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models import build_detector
from deperceiver_jax.models.features.pyramid import make_level_tokens
from deperceiver_jax.models.features.tokens import size_in_whole_cells
from deperceiver_jax.models.layers.arrays import over_arrays, shape_of
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import Undrawn
from deperceiver_jax.models.skeleton import take_apart

FLOAT32 = Compute(jnp.float32, attention="auto", rematerialize=False)


def draw_arrays(shapes):
    """{path: array} for {path: anything with a shape}, of such sizes that activations stay of the order of one.

    A detector's own initialisation takes longer to compile than these tests take.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for path, like in sorted(shapes.items()):
        values, kind = rng.standard_normal(like.shape, np.float32), path.split("/")[-1]
        if kind == "kernel":
            values *= (1.5 / math.prod(like.shape[-4:-1] if len(like.shape) > 3 else like.shape[-2:-1])) ** 0.5
        elif kind in ("scale", "var"):
            values = 1 + 0.1 * np.abs(values)
        elif kind in ("bias", "mean"):
            values *= 0.1
        arrays[path] = values
    return arrays


class Patches(nnx.Module):
    """Stands in for the ResNet where convolutions would only cost time: a cell is its mean pixel, zero on padding."""

    def __init__(
        self,
        *,
        depth,
        width,
        norm,
        frozen_stages,
        dilation,
        groups,
        inner_ratio,
        deformable_stages,
        strides,
        compute,
        rngs,
    ):
        self.strides = strides
        self.channels = {stride: self.channels_of(stride) for stride in strides}

    def channels_of(self, stride: int) -> int:
        return 3

    def __call__(self, image, pixel_valid):
        return {stride: self.mean_pixels(image, stride) for stride in self.strides}

    def mean_pixels(self, image, stride: int):
        batch, height, width, _ = image.shape
        rows, columns = -(-height // stride), -(-width // stride)
        image = jnp.pad(image, ((0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0)))
        return image.reshape(batch, rows, stride, columns, stride, 3).mean(axis=(2, 4))


def new_detector(config, backbone=Patches, rngs=None):
    """The detector of `config` as it starts, with `backbone` in the place of its ResNet, unless that is None."""
    with pytest.MonkeyPatch.context() as patch:
        if backbone:
            patch.setattr("deperceiver_jax.models.detector.ResNet", backbone)
        return build_detector(config, rngs=nnx.Rngs(0) if rngs is None else rngs)


def abstract_detector(config, backbone=None):
    """The detector of `config` without arrays: enough for its shapes, and for what is wrong with a config."""
    return over_arrays(shape_of, new_detector(config, backbone, Undrawn()))


def drawn_detector(config, backbone=Patches):
    """The detector of `config` with drawn arrays, the same for every config that has the same ones."""
    skeleton, params, others = take_apart(abstract_detector(config, backbone))
    return skeleton.merge(jax.device_put(draw_arrays({**params, **others})))


def answer_of(detector, *arguments, **options):
    """In NumPy; one program for all detectors that differ in their arrays alone."""
    return jax.device_get(_call(detector, *arguments, **options))


@nnx.jit
def _call(detector, *arguments, **options):
    return detector(*arguments, **options)


@jax.jit
def level_tokens(map_valid):
    """Of levels with these masks [B, h, w], in which an image is a whole number of cells; the tokens are zeros."""
    maps = [np.zeros((*valid.shape, 1), np.float32) for valid in map_valid]
    return make_level_tokens(maps, map_valid, size_in_whole_cells(map_valid))


def extents_seen(config, image, valid):
    """The sizes in cells [B, L, 2] with which the detector of `config` makes the tokens of these images."""
    seen = []

    def spy(maps, map_valid, extent):
        seen.append(extent)
        return make_level_tokens(maps, map_valid, extent)

    with pytest.MonkeyPatch.context() as patch:
        name = config.model.name
        patch.setattr(f"deperceiver_jax.models.{name}.{name}.make_level_tokens", spy)
        detector = drawn_detector(config)
        return jax.jit(lambda image, valid: (detector(image, valid), seen[0])[1])(image, valid)


def start_beside_backbone(config):
    """{path: array} of what the detector of `config` trains, as it starts, without its backbone."""
    return jax.device_get(take_apart(new_detector(config))[1])

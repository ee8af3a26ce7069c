"""A BiFPN against NumPy, layer by layer; that padding does not matter, and that every map reaches every other."""

import jax
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.features.bifpn import BiFPN
from deperceiver_jax.models.skeleton import take_apart
from tests.drawn_arrays import FLOAT32, draw_arrays

CHANNELS = {8: 3, 16: 4, 32: 5}
SIZES = {8: (5, 7), 16: (3, 4), 32: (2, 2)}


@pytest.fixture(scope="module")
def drawn():
    """(arrays by path, the compiled network with strides 8, 16 and 32) of two layers of width 4."""

    def make():
        how: dict = dict(num_layers=2, compute=FLOAT32, rngs=nnx.Rngs(0))
        return BiFPN(CHANNELS, 4, strides=(8, 16, 32), **how)

    skeleton, params, _ = take_apart(nnx.eval_shape(make))
    arrays = draw_arrays(params)
    arrays = {path: np.abs(x) if path.endswith("weight") else x for path, x in arrays.items()}
    network = jax.jit(lambda features, valid: skeleton.merge(arrays)(features, valid))
    return arrays, lambda features, valid: jax.device_get(network(features, valid))


def features_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {s: rng.standard_normal((1, *size, CHANNELS[s])).astype(np.float32) for s, size in sizes.items()}


def layer_norm(x, scale, bias):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def windows(x, stride, fill):
    """[h, w, C] -> the nine cells around every `stride`-th, [h / stride, w / stride, 3, 3, C]."""
    height, width, _ = x.shape
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=fill)
    return np.stack([[x[i : i + 3, j : j + 3] for j in range(0, width, stride)] for i in range(0, height, stride)])


def fuse(part, maps):
    """The shares, swish, depthwise and pointwise convolution, and norm of one Fusion."""
    weight = np.maximum(part("weight"), 0)
    mixed = sum(w * x for w, x in zip(weight / (weight.sum() + 1e-4), maps, strict=True))
    seen = windows(mixed / (1 + np.exp(-mixed)), 1, 0.0)
    x = np.einsum("hwijc,ijc->hwc", seen, part("depthwise/kernel")[:, :, 0])
    x = x @ part("pointwise/kernel") + part("pointwise/bias")
    return layer_norm(x, part("norm/scale"), part("norm/bias"))


def double(x, like):
    return x.repeat(2, axis=0).repeat(2, axis=1)[: like.shape[0], : like.shape[1]]


def test_two_layers_by_hand(drawn):
    arrays, network = drawn
    features = features_of(SIZES)
    maps, valid = network(features, np.ones((1, 40, 56), bool))

    x = []
    for i, s in enumerate((8, 16, 32)):
        projected = features[s][0] @ arrays[f"projections/{i}/kernel"] + arrays[f"projections/{i}/bias"]
        x.append(layer_norm(projected, arrays[f"norms/{i}/scale"], arrays[f"norms/{i}/bias"]))
    for layer in range(2):

        def fusion(name, maps, layer=layer):
            return fuse(lambda part: arrays[f"layers/layers/{name}/{part}"][layer], maps)

        middle = fusion("down/1", [x[1], double(x[2], x[1])])
        fine = fusion("down/0", [x[0], double(middle, x[0])])
        center = fusion("up/0", [x[1], middle, windows(fine, 2, -np.inf).max(axis=(2, 3))])
        coarse = fusion("up/1", [x[2], windows(center, 2, -np.inf).max(axis=(2, 3))])
        x = [fine, center, coarse]
    for ours, expected, of_map, size in zip(maps, x, valid, SIZES.values(), strict=True):
        assert of_map.shape == (1, *size)
        np.testing.assert_allclose(ours[0], expected, atol=1e-5)


def test_padding_does_not_matter(drawn):
    _, network = drawn
    image = features_of(SIZES)
    alone, _ = network(image, np.ones((1, 40, 56), bool))
    frame = features_of({8: (8, 8), 16: (4, 4), 32: (2, 2)}, seed=1)  # what padding holds is anything
    for s, (height, width) in SIZES.items():
        frame[s][:, :height, :width] = image[s]
    valid = np.zeros((1, 64, 64), bool)
    valid[:, :40, :56] = True
    padded, _ = network(frame, valid)
    for ours, expected, (height, width) in zip(padded, alone, SIZES.values(), strict=True):
        np.testing.assert_allclose(ours[:, :height, :width], expected, atol=1e-5)


def test_every_map_reaches_every_other(drawn):
    _, network = drawn
    features, valid = features_of(SIZES), np.ones((1, 40, 56), bool)
    still, _ = network(features, valid)
    for s in SIZES:
        moved, _ = network({**features, s: -features[s]}, valid)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(moved, still, strict=True))


def test_deeper_maps_take_part_that_are_no_levels():
    pyramid = nnx.eval_shape(lambda: BiFPN(CHANNELS, 4, strides=(8,), num_layers=1, compute=FLOAT32, rngs=nnx.Rngs(0)))
    maps, valid = nnx.eval_shape(lambda p: p(features_of(SIZES), np.ones((1, 40, 56), bool)), pyramid)
    assert [x.shape for x in maps] == [(1, 5, 7, 4)] and [x.shape for x in valid] == [(1, 5, 7)]

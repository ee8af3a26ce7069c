"""The encoder of convolutions: enlarging by hand, and what reaches the decoder. Values: golden tests."""

import jax
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.smca.convolution_encoder import ConvolutionEncoder, ConvolutionFields, resize_align_corners
from tests.drawn_arrays import FLOAT32, answer_of, level_tokens

FIELDS = dict(num_layers=2, kernel_size=3, pointwise=True, share_crossings=True, mlp_dim=8)


def make_encoder(strides, **changes):
    fields = ConvolutionFields(**{**FIELDS, **changes})
    return ConvolutionEncoder(4, fields, strides=strides, dropout=0.0, compute=FLOAT32, rngs=nnx.Rngs(0))


def test_corners_stay_where_they_are():

    def resize(x, *size):
        return np.asarray(jax.jit(resize_align_corners, static_argnums=(1, 2))(x, *size))

    x = np.float32([[0.0, 10.0], [20.0, 50.0]])[None, :, :, None]
    expected = [[0, 5, 10], [10, 20, 30], [20, 35, 50]]
    np.testing.assert_allclose(resize(x, 3, 3)[0, :, :, 0], expected, rtol=1e-6)
    row = np.arange(5, dtype=np.float32)[None, None, :, None] ** 2
    enlarged = np.interp(np.linspace(0, 4, 9), np.arange(5), np.arange(5) ** 2)
    np.testing.assert_allclose(resize(row, 2, 9)[0, 1, :, 0], enlarged, rtol=1e-6)
    np.testing.assert_allclose(resize(row[:, :, 2:3], 3, 2), 4)


def make_tokens(sizes):
    rng = np.random.default_rng(0)
    count = sum(height * width for height, width in sizes)
    tokens, position = (rng.standard_normal((2, count, 4)).astype(np.float32) for _ in range(2))
    image = jax.device_get(level_tokens([np.ones((2, *size), bool) for size in sizes]))
    valid = rng.integers(0, 2, (2, count)).astype(bool)
    return image.replace(tokens=tokens, position=position, valid=valid)


@pytest.mark.parametrize("share_crossings", [True, False])
def test_the_finest_map_is_halved(share_crossings):
    """A second map of the next level's size, with that level's positions and mask."""
    strides = (8, 16, 32)
    encoder = make_encoder(strides, share_crossings=share_crossings)
    before = make_tokens(((3, 5), (2, 3), (1, 2)))
    memory = answer_of(encoder, before)
    assert memory.sizes == ((2, 3), (2, 3), (1, 2))
    assert memory.tokens.shape == (2, 14, 4)
    for ours, theirs in (
        (memory.position, before.position),
        (memory.valid, before.valid),
        (memory.places, before.places),
    ):
        np.testing.assert_array_equal(ours[:, :6], theirs[:, 15:21])
        np.testing.assert_array_equal(ours[:, 6:], theirs[:, 15:])
    changed = before.tokens.copy()
    changed[0, 0] += 100
    difference = np.abs(answer_of(encoder, before.replace(tokens=changed)).tokens - memory.tokens).max(axis=-1)
    assert difference[0, 6:12].max() > 1e-3 and difference[0, 12:].max() > 1e-3  # it reached the other levels
    assert not difference[1].any()


@pytest.mark.parametrize(
    "strides, changes, sentence",
    [
        ((8, 32), {}, r"each of half the size of the one before; config.model.strides .* \(8, 32\)"),
        ((32,), {}, "needs two or more levels"),
        ((8, 16), {"kernel_size": 4}, "config.model.encoder.kernel_size is 4; it must be odd"),
        ((8, 16), {"num_layers": 0}, "config.model.encoder.num_layers is 0; it must be at least 1"),
        ((8, 16), {"mlp_dim": 0}, "config.model.encoder.mlp_dim is 0; it must be at least 1"),
    ],
)
def test_bad_fields_are_named(strides, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_encoder(strides, **changes)

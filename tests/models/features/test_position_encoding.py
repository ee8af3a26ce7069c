"""Position encodings against numbers from outside: the official code's, and Perceiver IO's by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.features.position_encoding import PositionEncoding, fourier_encoding, sine_encoding
from tests.drawn_arrays import answer_of


def valid_map(height, width, valid_height, valid_width):
    valid = np.zeros((1, height, width), bool)
    valid[:, :valid_height, :valid_width] = True
    return valid


sine = jax.jit(sine_encoding, static_argnums=1)
fourier = jax.jit(fourier_encoding, static_argnums=1)


@pytest.mark.parametrize(
    "cell, expected",
    [
        ((0, 0), [0.000001, -1, 0.031411, 0.999507, 0.866026, -0.499999, 0.020942, 0.999781]),
        ((1, 2), [-0.000003, 1, 0.062790, 0.998027, -0.000002, 1, 0.062790, 0.998027]),
        ((0, 3), [0, 1, 0, 1, -0.000002, 1, 0.062790, 0.998027]),
    ],
)
def test_sine_equals_the_official_code(cell, expected):
    encoding = np.asarray(sine(valid_map(3, 4, 2, 3), 8))
    np.testing.assert_allclose(encoding[0, *cell], expected, atol=2e-6)


@pytest.mark.parametrize(
    "size, bands, cell, expected",
    [
        # Perceiver IO's official order (sin, cos of each axis, then the positions); a map of its own size.
        ((2, 3), 2, (0, 1), [0, 0, -1, -1, 0, 0, 1, 1, -1, 0]),
        ((3, 5), 2, (1, 3), [0, 0, 1, 1, 1, np.sin(np.pi * 2.5 * 0.5), 0, np.cos(np.pi * 2.5 * 0.5), 0, 0.5]),
    ],
)
def test_fourier_by_hand(size, bands, cell, expected):
    encoding = np.asarray(fourier(valid_map(*size, *size), bands))
    np.testing.assert_allclose(encoding[0, *cell], expected, atol=1e-5)


def test_fourier_does_not_depend_on_padding():
    tight, padded = (np.asarray(fourier(valid_map(*frame, 3, 5), 4)) for frame in ((3, 5), (6, 8)))
    np.testing.assert_allclose(padded[:, :3, :5], tight, atol=1e-6)


def test_learned_has_columns_first_and_refuses_larger_maps():
    def make(encoding):
        fields = dict(encoding=encoding, fourier_bands=2, learned_size=5)
        return PositionEncoding(4, **fields, dtype=jnp.float32, rngs=nnx.Rngs(0))

    encoding = make("learned")
    out = answer_of(encoding, valid_map(3, 4, 2, 2))
    np.testing.assert_array_equal(out[0, 2, 1, :2], encoding.column[1])
    np.testing.assert_array_equal(out[0, 2, 1, 2:], encoding.row[2])
    with pytest.raises(UserError, match="learned_size >= 6"):
        encoding(valid_map(3, 6, 3, 6))
    with pytest.raises(UserError, match="sine, learned or fourier"):
        make("cosine")

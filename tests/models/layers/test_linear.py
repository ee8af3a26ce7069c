"""Dropout: how much of it falls, and that what falls is independent."""

import jax
import numpy as np
import pytest

from deperceiver_jax.models.layers.linear import draw_kept, dropout


@pytest.mark.parametrize("shape", [(200, 1000), (200, 999), (199_999, 1), (3,) * 11])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_many_fall_as_are_meant_to(shape, rate):
    dropped = np.asarray(jax.jit(dropout, static_argnums=1)(np.ones(shape, np.float32), rate, jax.random.key(0)))
    assert dropped.shape == shape
    fallen = dropped == 0
    deviation = np.sqrt(rate * (1 - rate) / fallen.size)
    assert abs(fallen.mean() - rate) < 4 * deviation
    np.testing.assert_allclose(dropped[~fallen], 1 / (1 - rate), rtol=1e-6)


def test_elements_that_share_random_bits_fall_independently():
    """The first half of the last axis has the lower bits of what the second one has the upper bits of."""
    kept = np.asarray(jax.jit(draw_kept, static_argnums=(0, 1))((500, 800), 0.5, jax.random.key(1)))
    lower, upper = kept[:, :400], kept[:, 400:]
    assert abs((lower == upper).mean() - 0.5) < 4 * np.sqrt(0.25 / lower.size)


def test_nothing_falls_without_key_or_rate():
    assert draw_kept((2, 3), 0.1, None) is None
    assert draw_kept((2, 3), 0.0, jax.random.key(0)) is None

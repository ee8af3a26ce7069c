"""Pooling as each platform computes it: values and gradients of JAX's own, also where cells of a window are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.models.layers.max_pool import max_pool


def windows(x):
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)


def test_windows_of_three_around_every_second_cell():
    """And nothing beyond the edge."""
    x = -np.arange(1, 21, dtype=np.float32).reshape(1, 4, 5, 1)
    expected = [[-1, -2, -4], [-6, -7, -9]]
    for pooled in jax.device_get(jax.jit(lambda x: (max_pool(x), max_pool(x, portable=True)))(x)):
        np.testing.assert_array_equal(pooled[0, :, :, 0], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("frame", [(8, 12), (7, 9), (1, 2), (6, 5)])
def test_values_and_gradients_are_those_of_windows(frame, dtype):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-2, 3, (2, *frame, 5)), 0).astype(dtype)  # most windows have equal cells
    x[1] -= 3  # and are below zero, which is not what lies around them
    halves = [-(-side // 2) for side in frame]
    gradient = rng.integers(-9, 10, (2, *halves, 5)).astype(dtype)  # whole numbers add up exactly in any order

    @jax.jit
    def results():
        pools = (jax.vjp(pool, x) for pool in (max_pool, windows))
        return [(value, *backward(gradient)) for value, backward in pools], max_pool(x, portable=True)

    ((value, found), (expected, wanted)), portable = results()
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(portable, expected)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


def test_only_a_cpu_compares():
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x) ** 2))).trace(x)
    for platform, chosen in (("cpu", False), ("tpu", True)):
        assert ("select_and_scatter" in gradient.lower(lowering_platforms=(platform,)).as_text()) == chosen

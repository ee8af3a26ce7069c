"""LayerNorm beside Flax's: the same numbers, with less kept for the backward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.skeleton import take_apart

SHAPE = (3, 7, 64)


def pair(dtype, x_dtype):
    """Ours and Flax's as functions of (x, scale, bias), and what to call them with: no parameter is as at the start."""
    rng = np.random.default_rng(0)
    parameters = jnp.float64 if dtype == jnp.float64 else jnp.float32
    x = (3.0 + 2.0 * rng.standard_normal(SHAPE)).astype(x_dtype)
    scale, bias = (rng.standard_normal(SHAPE[-1]).astype(parameters) for _ in range(2))
    theirs = nnx.LayerNorm(
        SHAPE[-1], epsilon=1e-5, use_fast_variance=False, dtype=dtype, param_dtype=parameters, rngs=nnx.Rngs(0)
    )

    def function(norm):
        skeleton, _, _ = take_apart(norm)
        return lambda x, scale, bias: skeleton.merge({"scale": scale, "bias": bias})(x)

    return [function(LayerNorm(SHAPE[-1], dtype=dtype)), function(theirs)], (x, scale, bias)


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "tolerance"),
    [
        ("float32", "float32", 1e-5),
        ("float64", "float64", 1e-12),
        ("bfloat16", "bfloat16", 1e-2),
        ("float32", "bfloat16", 1e-2),
        ("bfloat16", "float32", 1e-2),
    ],
)
def test_values_and_gradients_are_flax_s(dtype, x_dtype, tolerance):
    """In bfloat16 the gradient of x is rounded once; Flax's is a sum of two that are."""
    with jax.enable_x64(True):
        functions, arguments = pair(jnp.dtype(dtype), jnp.dtype(x_dtype))
        weights = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)

        def value_and_gradients(function):
            value, backward = jax.vjp(function, *arguments)
            return function(*arguments), value, *backward(weights.astype(value.dtype))

        both = jax.device_get(jax.jit(lambda: [value_and_gradients(function) for function in functions])())
        for ours, theirs in zip(*both, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            scale = np.float64(np.abs(theirs).max())
            np.testing.assert_allclose(*(np.float64(a) / scale for a in (ours, theirs)), atol=tolerance)


def test_it_keeps_its_input_and_two_numbers_a_row():
    (ours, theirs), arguments = pair(jnp.bfloat16, jnp.bfloat16)
    kept = [jax.eval_shape(lambda *a, f=f: jax.vjp(f, *a)[1], *arguments) for f in (ours, theirs)]
    kept = [sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(backward)) for backward in kept]
    x = arguments[0]
    assert kept[0] == x.nbytes + 2 * 4 * x.size // SHAPE[-1] + 2 * 4 * SHAPE[-1]
    assert kept[1] > 2 * kept[0]

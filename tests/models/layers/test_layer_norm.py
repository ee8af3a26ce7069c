"""LayerNorm beside Flax's: the same numbers, with less kept for the backward pass."""

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
    x = jnp.asarray(3.0 + 2.0 * rng.standard_normal(SHAPE), x_dtype)
    scale, bias = (jnp.asarray(rng.standard_normal(SHAPE[-1]), parameters) for _ in range(2))
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
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
        values = [jax.jit(function)(*arguments) for function in functions]
        gradients = [
            jax.jit(jax.grad(lambda *a, f=function: jnp.sum(f(*a).astype(weights.dtype) * weights), argnums=(0, 1, 2)))(
                *arguments
            )
            for function in functions
        ]
        for ours, theirs in zip(*map(jax.tree.leaves, zip(values, gradients, strict=True)), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            scale = float(jnp.abs(theirs).max())
            np.testing.assert_allclose(*(np.float64(a) / scale for a in (ours, theirs)), atol=tolerance)


def test_it_keeps_its_input_and_two_numbers_a_row():
    (ours, theirs), arguments = pair(jnp.bfloat16, jnp.bfloat16)
    kept = [sum(a.nbytes for a in jax.tree.leaves(jax.vjp(f, *arguments)[1])) for f in (ours, theirs)]
    x = arguments[0]
    assert kept[0] == x.nbytes + 2 * 4 * x.size // SHAPE[-1] + 2 * 4 * SHAPE[-1]
    assert kept[1] > 2 * kept[0]

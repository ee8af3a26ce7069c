"""ReLU with dropout, beside JAX's own: the same numbers, and less that waits for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.layers.activations import masked_relu, relu
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.layer_stack import LayerStack
from deperceiver_jax.models.layers.linear import dropout
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer
from tests.meshes import mesh_on

EDGES = (0.0, -0.0, np.nan, np.inf, -np.inf, 2e-38, -2e-38)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_are_those_of_jax(rate, dtype):
    x, gradient = np.random.default_rng(0).standard_normal((2, 40, 50)).astype(dtype)
    x[:, : len(EDGES)] = EDGES
    key = jax.random.key(0)

    def run(function):
        @jax.jit
        def value_and_gradient(x, gradient):
            value, backward = jax.vjp(function, x)
            return value, *backward(gradient)

        return jax.device_get(value_and_gradient(x, gradient))

    found, expected = run(lambda x: relu(x, rate, key)), run(lambda x: dropout(jax.nn.relu(x), rate, key))
    if not rate:
        found, expected = (*found, *run(masked_relu)), (*expected, *expected)
    for array, other in zip(found, expected, strict=True):
        assert array.dtype == other.dtype == dtype
        # XLA multiplies by a rounded reciprocal here, and divides there.
        np.testing.assert_allclose(array.astype(np.float32), other.astype(np.float32), rtol=2e-7 if rate else 0)


def test_a_cpu_computes_the_result_of_every_block_once():
    """The compiler would for each that takes it: here, the next block, the sum and the gradients."""

    @traced_for(mesh_on("cpu"))
    def loss(x, kernels):
        for kernel in kernels:
            x = masked_relu(x + x @ kernel)
        return jnp.sum(jnp.sin(x))

    x = np.ones((64, 32), np.float32)
    program = jax.jit(jax.grad(loss, argnums=1)).lower(x, [np.ones((32, 32), np.float32)] * 3).compile().as_text()
    assert program.count(" maximum(") == 3


class Layer(TransformerLayer):
    def __call__(self, x, *, dropout_key=None):
        return self.mlp_sublayer(x, dropout_key)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_hidden_rows_are_kept_once_and_no_mask_of_them(rate):
    compute = Compute(jnp.float32, "xla", rematerialize=False)
    stack = LayerStack(Layer, 3, 8, mlp_dim=32, dropout=rate, compute=compute, rngs=nnx.Rngs(0))
    graphdef, arrays = nnx.split(stack)

    def apply(arrays, x):
        return nnx.merge(graphdef, arrays)(x, dropout_key=jax.random.key(0))

    kept = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(apply, *inputs)[1], arrays, jnp.ones((2, 5, 8))))
    hidden = [array for array in kept if array.shape == (3, 2, 5, 32)]
    assert [array.dtype for array in hidden] == [jnp.float32]


def test_a_carried_result_is_kept_as_a_mask():
    kept = jax.eval_shape(lambda x: jax.vjp(masked_relu, x)[1], jnp.ones((2, 5, 8)))
    assert [(array.shape, array.dtype) for array in jax.tree.leaves(kept)] == [((2, 5, 8), bool)]

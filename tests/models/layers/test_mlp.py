"""The multilayer perceptron, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deperceiver_jax.models.layers.activations import exact_gelu
from deperceiver_jax.models.layers.mlp import MLP


def test_gates_by_hand():
    """Of each hidden layer's output, the second half opens the first."""
    mlp = MLP([2, 3, 1], activation=exact_gelu, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    first, last = mlp.layers
    assert first.kernel.shape == (2, 6) and last.kernel.shape == (3, 1)
    x = jax.random.normal(jax.random.key(0), (5, 2))
    hidden = np.asarray(x @ first.kernel[...] + first.bias[...][None])
    hidden = hidden[:, :3] * np.asarray(jax.nn.gelu(hidden[:, 3:], approximate=False))
    np.testing.assert_allclose(mlp(x), hidden @ last.kernel[...] + last.bias[...][None], rtol=1e-5, atol=1e-6)

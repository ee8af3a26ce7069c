"""The multilayer perceptron, by hand."""

import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import nnx

from deperceiver_jax.models.layers.activations import exact_gelu
from deperceiver_jax.models.layers.mlp import MLP
from tests.drawn_arrays import answer_of


def test_gates_by_hand():
    """Of each hidden layer's output, the second half opens the first."""
    mlp = MLP([2, 3, 1], activation=exact_gelu, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    first, last = mlp.layers
    assert first.kernel.shape == (2, 6) and last.kernel.shape == (3, 1)
    x = np.random.default_rng(0).standard_normal((5, 2), np.float32)
    hidden = x @ first.kernel[...] + first.bias[...][None]
    hidden = hidden[:, :3] * hidden[:, 3:] * scipy.stats.norm.cdf(hidden[:, 3:])
    expected = hidden @ last.kernel[...] + last.bias[...][None]
    np.testing.assert_allclose(answer_of(mlp, x), expected, rtol=1e-5, atol=1e-6)

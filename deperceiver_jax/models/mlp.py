"""The multilayer perceptron, for transformer blocks and box heads alike."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from deperceiver_jax.models.linear import dropout, linear


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as PyTorch; JAX's own default is a tanh approximation of it."""
    return jax.nn.gelu(x, approximate=False)


class MLP(nnx.Module):
    """Linear layers with an activation between them: widths dims[0] -> dims[1] -> ... -> dims[-1]."""

    def __init__(
        self,
        dims: Sequence[int],
        *,
        activation: Callable[[jax.Array], jax.Array],
        dropout: float = 0.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List([linear(a, b, dtype=dtype, rngs=rngs) for a, b in zip(dims, dims[1:], strict=False)])
        self.activation = activation
        self.dropout = dropout

    def __call__(self, x: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """[..., dims[0]] -> [..., dims[-1]]; dropout only on the result."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return dropout(self.layers[-1](x), self.dropout, dropout_key)

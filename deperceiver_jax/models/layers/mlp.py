"""The multilayer perceptron, for transformer blocks and box heads alike."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from deperceiver_jax.models.layers.linear import dropout, linear, split_key, xavier_uniform_init


class MLP(nnx.Module):
    """Linear layers with an activation (of activations.py) between them: widths dims[0] -> dims[1] -> ... -> dims[-1].

    Layers start as torch.nn.Linear does; `xavier` draws their kernels Xavier-uniformly and leaves the biases so.
    `gated`: each layer but the last is twice as wide, and its second half, activated, multiplies the first, as in
    "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        activation: Callable,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        xavier: bool = False,
        gated: bool = False,
        dtype,
        precision: jax.lax.Precision | None = None,
        rngs: nnx.Rngs,
    ):
        def layer(a, b):
            start = dict(kernel_init=xavier_uniform_init(a, b)) if xavier else {}
            return linear(a, b, **start, dtype=dtype, precision=precision, rngs=rngs)

        outputs = [*(width * (2 if gated else 1) for width in dims[1:-1]), dims[-1]]
        self.layers = nnx.List([layer(a, b) for a, b in zip(dims[:-1], outputs, strict=True)])
        self.gated = gated
        self.activation = activation
        self.dropout = dropout
        self.hidden_dropout = hidden_dropout

    def __call__(self, x: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """[..., dims[0]] -> [..., dims[-1]]; `dropout` on the result, `hidden_dropout` after each activation."""
        keys = split_key(dropout_key, len(self.layers)) if self.hidden_dropout else [dropout_key] * len(self.layers)
        for layer, key in zip(self.layers[:-1], keys[:-1], strict=True):
            x = self._activate(layer(x), key)
        return dropout(self.layers[-1](x), self.dropout, keys[-1])

    def _activate(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        if not self.gated:
            return self.activation(x, self.hidden_dropout, dropout_key)
        value, gate = jnp.split(x, 2, axis=-1)
        return dropout(value * self.activation(gate), self.hidden_dropout, dropout_key)

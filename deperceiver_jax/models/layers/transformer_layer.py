"""What the layers of every DETR-like encoder and decoder share: sublayers with dropout, residual and norm."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array

from deperceiver_jax.models.layers.activations import relu
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.linear import dropout, split_key
from deperceiver_jax.models.layers.mlp import MLP


class TransformerLayer(nnx.Module):
    """Norms follow each residual sum (post-norm) or precede each sublayer (pre-norm); the MLP is the last sublayer.

    `mlp_dim` 0 leaves the MLP and its norm out (an ablation of DETR's paper).
    """

    def __init__(
        self, dim: int, *, mlp_dim: int, dropout: float, pre_norm: bool = False, compute: Compute, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        self.pre_norm = pre_norm
        self.has_mlp = mlp_dim > 0
        if self.has_mlp:
            self.mlp = MLP(
                [dim, mlp_dim, dim],
                activation=relu,
                hidden_dropout=dropout,
                xavier=True,
                dtype=compute.dtype,
                rngs=rngs,
            )
            self.mlp_norm = LayerNorm(dim, dtype=compute.dtype)

    def sublayer(self, x: Array, norm: LayerNorm, function: Callable[[Array], Array], key) -> Array:
        """norm(x + dropout(function(x))), or x + dropout(function(norm(x))) with pre-norm."""
        if self.pre_norm:
            return x + dropout(function(norm(x)), self.dropout, key)
        return norm(x + dropout(function(x), self.dropout, key))

    def mlp_sublayer(self, x: Array, dropout_key) -> Array:
        if not self.has_mlp:
            return x
        key_hidden, key_out = split_key(dropout_key, 2)
        return self.sublayer(x, self.mlp_norm, lambda y: self.mlp(y, dropout_key=key_hidden), key_out)

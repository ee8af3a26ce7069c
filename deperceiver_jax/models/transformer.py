"""DETR's transformer: an encoder over image tokens and a decoder of object queries.

Source: arXiv:2005.12872, appendix A.3. It differs from the original transformer in that position encodings enter the
queries and keys of every attention and never the values. Norms follow each residual sum (post-norm) or precede each
sublayer (pre-norm). Both stacks are LayerStacks, so XLA compiles one layer of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.linear import dropout, split_key
from deperceiver_jax.models.mlp import MLP


def _add(x: Array, position: Array | None) -> Array:
    return x if position is None else x + position


class TransformerLayer(nnx.Module):
    """What encoder and decoder layers share: sublayers with dropout, residual and norm, the last of them the MLP.

    `mlp_dim` 0 leaves the MLP and its norm out (an ablation of DETR's paper).
    """

    def __init__(self, dim: int, *, mlp_dim: int, dropout: float, pre_norm: bool, dtype, rngs: nnx.Rngs):
        self.dropout = dropout
        self.pre_norm = pre_norm
        self.has_mlp = mlp_dim > 0
        if self.has_mlp:
            self.mlp = MLP(
                [dim, mlp_dim, dim],
                activation=jax.nn.relu,
                hidden_dropout=dropout,
                xavier=True,
                dtype=dtype,
                rngs=rngs,
            )
            self.mlp_norm = LayerNorm(dim, dtype=dtype)

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


class EncoderLayer(TransformerLayer):
    """Self-attention among the image tokens, then the MLP."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float, dtype, rngs: nnx.Rngs, **layer):
        super().__init__(dim, dropout=dropout, dtype=dtype, rngs=rngs, **layer)
        self.attention = MultiHeadAttention(dim, num_heads, dropout=dropout, xavier=True, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(dim, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B M D"],
        position: Float[Array, "B M D"] | None,
        token_valid: Bool[Array, "B M"],
        *,
        dropout_key=None,
    ) -> Float[Array, "B M D"]:
        """Padding is no key for any token, but is computed as a query: a token without keys would be undefined."""
        key_probability, key_attention, key_mlp = split_key(dropout_key, 3)

        def attend(y):
            query = _add(y, position)
            return self.attention(query, query, y, key_valid=token_valid, dropout_key=key_probability)

        x = self.sublayer(x, self.attention_norm, attend, key_attention)
        return self.mlp_sublayer(x, key_mlp)


class DecoderLayer(TransformerLayer):
    """Self-attention among the object queries, cross-attention to the memory, then the MLP."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float, dtype, rngs: nnx.Rngs, **layer):
        super().__init__(dim, dropout=dropout, dtype=dtype, rngs=rngs, **layer)
        attention = dict(dropout=dropout, xavier=True, dtype=dtype, rngs=rngs)
        self.self_attention = MultiHeadAttention(dim, num_heads, **attention)
        self.self_attention_norm = LayerNorm(dim, dtype=dtype)
        self.cross_attention = MultiHeadAttention(dim, num_heads, **attention)
        self.cross_attention_norm = LayerNorm(dim, dtype=dtype)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"] | None,
        memory: Float[Array, "B M D"],
        memory_key: Float[Array, "B M D"],
        token_valid: Bool[Array, "B M"],
        *,
        dropout_key=None,
        **modulation,
    ) -> Float[Array, "B Q D"]:
        """`memory_key` is the memory with its position; `memory` itself makes the values.

        `modulation`: a bias and segments for the cross-attention, see MultiHeadAttention.
        """
        keys = split_key(dropout_key, 5)

        def attend_queries(y):
            query = _add(y, query_position)
            return self.self_attention(query, query, y, dropout_key=keys[0])

        def attend_memory(y):
            query = _add(y, query_position)
            mask = dict(key_valid=token_valid, dropout_key=keys[1])
            return self.cross_attention(query, memory_key, memory, **mask, **modulation)

        content = self.sublayer(content, self.self_attention_norm, attend_queries, keys[2])
        content = self.sublayer(content, self.cross_attention_norm, attend_memory, keys[3])
        return self.mlp_sublayer(content, keys[4])


def _share_initial_biases(stack: LayerStack | None) -> None:
    """Published layers start as copies of one another up to their matrices, so the MLPs' random biases are equal."""
    if stack is not None and hasattr(stack.layers, "mlp"):
        for layer in stack.layers.mlp.layers:
            layer.bias[...] = jnp.broadcast_to(layer.bias[...][:1], layer.bias.shape)


class TransformerEncoder(nnx.Module):
    """Image tokens -> memory. Pre-norm ends in a norm; post-norm layers bring their own. No layers: the tokens."""

    def __init__(
        self, dim: int, *, num_layers: int, num_heads: int, mlp_dim: int, pre_norm: bool, dropout: float, dtype, rngs
    ):
        layer = dict(mlp_dim=mlp_dim, pre_norm=pre_norm, dropout=dropout, dtype=dtype)
        self.layers = (
            LayerStack(lambda rngs: EncoderLayer(dim, num_heads, rngs=rngs, **layer), num_layers, rngs=rngs)
            if num_layers
            else None
        )
        _share_initial_biases(self.layers)
        self.norm = LayerNorm(dim, dtype=dtype) if pre_norm else None

    def __call__(
        self,
        tokens: Float[Array, "B M D"],
        position: Float[Array, "B M D"] | None,
        token_valid: Bool[Array, "B M"],
        *,
        dropout_key=None,
    ) -> Float[Array, "B M D"]:
        memory = tokens
        if self.layers is not None:
            memory = self.layers(tokens, position, token_valid, dropout_key=dropout_key)
        return memory if self.norm is None else self.norm(memory)


class TransformerDecoder(nnx.Module):
    """Memory -> one embedding per object query, from every layer, through one norm that all layers share.

    The content of the queries starts at zero and the learned query position enters every attention; with
    `query_position` "input" the content starts as the position, which is then never added again.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int,
        *,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        query_position: str,
        pre_norm: bool,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        if num_layers < 1:
            raise UserError(f"config.model.decoder.num_layers is {num_layers}; it must be at least 1.")
        if query_position not in ("attention", "input"):
            raise UserError(f"config.model.decoder.query_position is {query_position!r}; it can be attention or input.")
        layer = dict(mlp_dim=mlp_dim, pre_norm=pre_norm, dropout=dropout, dtype=dtype)
        self.query_position = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_queries, dim)))
        self.position_at_attention = query_position == "attention"
        self.layers = LayerStack(lambda rngs: DecoderLayer(dim, num_heads, rngs=rngs, **layer), num_layers, rngs=rngs)
        _share_initial_biases(self.layers)
        self.norm = LayerNorm(dim, dtype=dtype)
        self.dtype = dtype

    def __call__(
        self,
        memory: Float[Array, "B M D"],
        position: Float[Array, "B M D"] | None,
        token_valid: Bool[Array, "B M"],
        *,
        dropout_key=None,
    ) -> Float[Array, "L B Q D"]:
        """`position` is added to the keys of the cross-attention alone."""
        query_position = jnp.broadcast_to(
            self.query_position[...].astype(self.dtype), (memory.shape[0], *self.query_position.shape)
        )
        content = jnp.zeros_like(query_position)
        if not self.position_at_attention:
            content, query_position = query_position, None
        decoded = self.layers(
            content, query_position, memory, _add(memory, position), token_valid, dropout_key=dropout_key, collect=True
        )
        return self.norm(decoded)

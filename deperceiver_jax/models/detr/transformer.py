"""DETR's transformer: an encoder over image tokens and a decoder of object queries.

Source: arXiv:2005.12872, appendix A.3. It differs from the original transformer in that position encodings enter the
queries and keys of every attention and never the values. Norms follow each residual sum (post-norm) or precede each
sublayer (pre-norm). Both stacks are LayerStacks, so XLA compiles one layer of each.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import check_at_least, check_choice
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.attention.query_layer import QueryLayer
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack, start_alike
from deperceiver_jax.models.layers.linear import split_key
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer


def _add(x: Array, position: Array | None) -> Array:
    return x if position is None else x + position


class EncoderLayer(TransformerLayer):
    """Self-attention among the image tokens, then the MLP."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float, compute: Compute, rngs: nnx.Rngs, **layer):
        super().__init__(dim, dropout=dropout, compute=compute, rngs=rngs, **layer)
        self.attention = MultiHeadAttention(dim, num_heads, dropout=dropout, xavier=True, compute=compute, rngs=rngs)
        self.attention_norm = LayerNorm(dim, dtype=compute.dtype)

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


class DecoderLayer(QueryLayer):
    """Self-attention among the object queries, cross-attention to the memory, then the MLP."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float, compute: Compute, rngs: nnx.Rngs, **layer):
        shared: dict = dict(dropout=dropout, compute=compute, rngs=rngs)
        super().__init__(dim, num_heads, **shared, **layer)
        self.cross_attention = MultiHeadAttention(dim, num_heads, xavier=True, **shared)

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
        key_queries, key_memory, *keys = split_key(dropout_key, 5)

        def attend_memory(y):
            masks = dict(key_valid=token_valid, dropout_key=key_memory, **modulation)
            return self.cross_attention(_add(y, query_position), memory_key, memory, **masks)

        return self.decode(content, query_position, attend_memory, [key_queries, *keys])


def _stack(layer: type[TransformerLayer], num_layers: int, *arguments, **options) -> LayerStack | None:
    """LayerStack, whose layers start with the same biases in their MLPs; None for no layers."""
    if not num_layers:
        return None
    stack = LayerStack(layer, num_layers, *arguments, **options)
    if stack.layers.has_mlp:
        start_alike(stack.layers.mlp, kernels=False)
    return stack


class TransformerEncoder(nnx.Module):
    """Image tokens -> memory. Pre-norm ends in a norm; post-norm layers bring their own. No layers: the tokens."""

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        pre_norm: bool,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_at_least("config.model.encoder.num_layers", num_layers, 0)
        check_at_least("config.model.encoder.mlp_dim", mlp_dim, 0)
        layer: dict = dict(mlp_dim=mlp_dim, pre_norm=pre_norm, dropout=dropout, compute=compute, rngs=rngs)
        self.layers = _stack(EncoderLayer, num_layers, dim, num_heads, **layer)
        self.norm = LayerNorm(dim, dtype=compute.dtype) if pre_norm else None

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
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_at_least("config.model.decoder.num_layers", num_layers, 1)
        check_at_least("config.model.decoder.mlp_dim", mlp_dim, 0)
        check_choice("config.model.decoder.query_position", query_position, ("attention", "input"))
        layer: dict = dict(mlp_dim=mlp_dim, pre_norm=pre_norm, dropout=dropout, compute=compute, rngs=rngs)
        self.query_position = nnx.Param(normal(1.0)(rngs.params(), (num_queries, dim)))
        self.position_at_attention = query_position == "attention"
        self.layers = _stack(DecoderLayer, num_layers, dim, num_heads, **layer)
        self.norm = LayerNorm(dim, dtype=compute.dtype)
        self.dtype = compute.dtype

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

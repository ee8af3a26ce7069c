"""Perceiver IO: a small array of latents reads the image tokens, thinks, and is read by the object queries.

The cost is linear in the number of tokens: only cross-attentions touch them. Blocks follow arXiv:2107.14795 with
pre-norm, and DePerceiver's published choices are single values of the fields (see configs/deperceiver.py). What the
official code calls `qkv_layer_norm` is `mlp_norm` here: the norm before the MLP.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError, check_above_zero, check_at_least, check_choice, check_fraction
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.deperceiver.anchors import Anchors, GaussianBias
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.layers.activations import exact_gelu
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import normal, truncated_normal
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack, apply_rematerialized
from deperceiver_jax.models.layers.linear import dropout, split_key
from deperceiver_jax.models.layers.mlp import MLP
from deperceiver_jax.models.layers.recorder import is_recording

LATENT_INITS = {"normal": normal, "truncated_normal": truncated_normal}


@dataclass(frozen=True)
class EncoderFields:
    """config.model.encoder; configs/deperceiver.py says what each field does."""

    num_latents: int
    latent_dim: int
    latent_init: str
    latent_scale: float
    num_blocks: int
    layers_per_block: int
    share_blocks: bool
    num_cross_attentions: int
    cross_heads: int
    self_heads: int
    mlp_ratio: float
    gated_mlp: bool
    anchors: bool
    anchor_width: float

    def __post_init__(self):
        for name in ("num_latents", "latent_dim", "num_blocks", "layers_per_block"):
            check_at_least(f"config.model.encoder.{name}", getattr(self, name), 1)
        if not 1 <= self.num_cross_attentions <= self.num_blocks:
            raise UserError(
                f"config.model.encoder.num_cross_attentions is {self.num_cross_attentions}; with {self.num_blocks} "
                f"blocks it can be 1 to {self.num_blocks}."
            )
        for name in ("mlp_ratio", "anchor_width", "latent_scale"):
            check_above_zero(f"config.model.encoder.{name}", getattr(self, name))
        check_choice("config.model.encoder.latent_init", self.latent_init, LATENT_INITS)


@dataclass(frozen=True)
class DecoderFields:
    """config.model.decoder; configs/deperceiver.py says what each field does."""

    num_layers: int
    self_attention: bool
    self_attention_value: str
    residual: str
    final_norm: bool
    cross_heads: int
    self_heads: int
    mlp_ratio: float
    dropout: float
    anchors: bool
    anchor_width: float

    def __post_init__(self):
        check_at_least("config.model.decoder.num_layers", self.num_layers, 0)
        for name in ("mlp_ratio", "anchor_width"):
            check_above_zero(f"config.model.decoder.{name}", getattr(self, name))
        check_fraction("config.model.decoder.dropout", self.dropout)
        check_choice("config.model.decoder.residual", self.residual, ("none", "content", "query"))
        check_choice("config.model.decoder.self_attention_value", self.self_attention_value, ("query", "content"))


def _mlp(dim: int, ratio: float, gated: bool, rate: float, dtype, rngs: nnx.Rngs) -> MLP:
    return MLP([dim, round(dim * ratio), dim], activation=exact_gelu, gated=gated, dropout=rate, dtype=dtype, rngs=rngs)


class SelfAttentionLayer(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        gated_mlp: bool,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(dim, dtype=compute.dtype)
        self.attention = MultiHeadAttention(dim, num_heads, compute=compute, rngs=rngs)
        self.mlp_norm = LayerNorm(dim, dtype=compute.dtype)
        self.mlp = _mlp(dim, mlp_ratio, gated_mlp, dropout, compute.dtype, rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "B N D"], *, dropout_key=None) -> Float[Array, "B N D"]:
        key_attention, key_mlp = split_key(dropout_key, 2)
        normed = self.norm(x)
        x = x + dropout(self.attention(normed, normed, normed), self.dropout, key_attention)
        return x + self.mlp(self.mlp_norm(x), dropout_key=key_mlp)


class CrossAttentionLayer(nnx.Module):
    """a = attention(norm(query), norm(tokens)); x = residual + a; then x + MLP(norm(x))."""

    def __init__(
        self,
        query_dim: int,
        token_dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        gated_mlp: bool = False,
        dropout: float,
        gaussian_width: float | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.query_norm = LayerNorm(query_dim, dtype=compute.dtype)
        self.token_norm = LayerNorm(token_dim, dtype=compute.dtype)
        self.attention = MultiHeadAttention(query_dim, num_heads, key_dim=token_dim, compute=compute, rngs=rngs)
        self.mlp_norm = LayerNorm(query_dim, dtype=compute.dtype)
        self.mlp = _mlp(query_dim, mlp_ratio, gated_mlp, dropout, compute.dtype, rngs)
        self.gaussian = None if gaussian_width is None else GaussianBias(num_heads, gaussian_width)
        self.dropout = dropout

    def __call__(
        self,
        query: Float[Array, "B N D"],
        tokens: Float[Array, "B M C"],
        *,
        token_valid: Bool[Array, "B M"] | None = None,
        key_position: Float[Array, "B M C"] | None = None,
        places: tuple[Float[Array, "A N 2"], Float[Array, "B M 2"]] | None = None,
        residual: Float[Array, "B N D"] | None = None,
        dropout_key=None,
    ) -> Float[Array, "B N D"]:
        """`key_position` is added to the keys alone, after the norm. No `residual`: the attention result by itself.

        A layer made with `gaussian_width` needs `places`: where the queries and the tokens are.
        """
        key_attention, key_mlp = split_key(dropout_key, 2)
        # The barrier keeps a TPU's compiler from computing the norm's gradient inside of the keys' and values': for
        # the tokens of stride 8 that does not fit into the chip's scratch memory, and the compiler gives up.
        values = jax.lax.optimization_barrier(self.token_norm(tokens))
        keys = values if key_position is None else values + key_position.astype(values.dtype)
        bias = None if self.gaussian is None else self.gaussian(*places)
        attended = self.attention(self.query_norm(query), keys, values, key_valid=token_valid, bias=bias)
        x = dropout(attended, self.dropout, key_attention)
        if residual is not None:
            x = residual + x
        return x + self.mlp(self.mlp_norm(x), dropout_key=key_mlp)


class PerceiverEncoder(nnx.Module):
    """Image tokens -> latents: an input cross-attention, then blocks of self-attention among the latents.

    `num_cross_attentions` of the blocks begin with an input cross-attention; Perceiver IO has one, before the first.
    `share_blocks` applies the same layers in every block.
    """

    def __init__(self, token_dim: int, fields: EncoderFields, *, dropout: float, compute: Compute, rngs: nnx.Rngs):
        layer: dict = dict(mlp_ratio=fields.mlp_ratio, gated_mlp=fields.gated_mlp, dropout=dropout)
        layer |= dict(compute=compute, rngs=rngs)
        self.fields = fields
        self.anchors = Anchors(fields.num_latents) if fields.anchors else None
        self.rematerialize = compute.rematerialize
        self.portable = compute.portable
        self.dtype = compute.dtype
        init, shape = LATENT_INITS[fields.latent_init](fields.latent_scale), (fields.num_latents, fields.latent_dim)
        self.latents = nnx.Param(init(rngs.params(), shape))
        width, gaussian_width = fields.latent_dim, fields.anchor_width if fields.anchors else None
        self.cross_attentions = nnx.List(
            [
                CrossAttentionLayer(width, token_dim, fields.cross_heads, gaussian_width=gaussian_width, **layer)
                for _ in range(fields.num_cross_attentions)
            ]
        )
        num_layers = fields.layers_per_block * (1 if fields.share_blocks else fields.num_blocks)
        self.blocks = LayerStack(SelfAttentionLayer, num_layers, width, fields.self_heads, **layer)

    def __call__(self, image: LevelTokens, *, dropout_key=None) -> Float[Array, "B N D"]:
        """Latents after the last block; a norm is the decoder's matter."""
        keys = split_key(dropout_key, 2 * self.fields.num_blocks)
        latents = jnp.broadcast_to(self.latents[...].astype(self.dtype), (image.tokens.shape[0], *self.latents.shape))
        places = None if self.anchors is None else (self.anchors()[None], image.places)
        last = len(self.cross_attentions) - 1
        for block, cross_attention in enumerate(self.cross_attentions):
            if self.rematerialize and not is_recording():
                cross_attention = functools.partial(apply_rematerialized, cross_attention)
            latents = cross_attention(
                latents,
                image.tokens,
                token_valid=image.valid,
                key_position=image.position,
                places=places,
                residual=latents,
                dropout_key=keys[2 * block],
            )
            if block < last:
                latents = self._apply_block(block, latents, keys[2 * block + 1])
        return self._apply_remaining_blocks(last, latents, keys[1::2])

    def _apply_block(self, block, latents, key):
        count = self.fields.layers_per_block
        start = 0 if self.fields.share_blocks else block * count
        return self.blocks(latents, start=start, stop=start + count, dropout_key=key)

    def _apply_remaining_blocks(self, first, latents, keys):
        if not self.fields.share_blocks:
            return self.blocks(latents, start=first * self.fields.layers_per_block, dropout_key=keys[first])
        if is_recording() or self.portable:  # a loop of JAX would keep what happens inside to itself
            for key in keys[first:]:
                latents = self.blocks(latents, dropout_key=key)
            return latents
        keys = None if keys[first] is None else jnp.stack(keys[first:])

        def apply_block(latents, key):
            return self.blocks(latents, dropout_key=key), None

        return jax.lax.scan(apply_block, latents, keys, length=self.fields.num_blocks - first)[0]


class PerceiverDecoderLayer(nnx.Module):
    """Object queries look at each other (optional), then at the latents.

    The published multi-layer decoder has no residual around its cross-attention and lets the query position into the
    self-attention's values; `residual` and `self_attention_value` mend either.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        fields: DecoderFields,
        *,
        gaussian_width: float | None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.fields = fields
        shared: dict = dict(dropout=fields.dropout, compute=compute, rngs=rngs)
        if fields.self_attention:
            self.self_attention = MultiHeadAttention(dim, fields.self_heads, **shared)
            self.self_attention_norm = LayerNorm(dim, dtype=compute.dtype)
        self.cross_attention = CrossAttentionLayer(
            dim, latent_dim, fields.cross_heads, mlp_ratio=fields.mlp_ratio, gaussian_width=gaussian_width, **shared
        )

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        latents: Float[Array, "B N C"],
        places: tuple[Float[Array, "1 Q 2"], Float[Array, "1 N 2"]] | None = None,
        *,
        dropout_key=None,
    ) -> Float[Array, "B Q D"]:
        key_self, key_cross = split_key(dropout_key, 2)
        if self.fields.self_attention:
            query = content + query_position
            value = query if self.fields.self_attention_value == "query" else content
            attended = self.self_attention(query, query, value, dropout_key=key_self)
            content = self.self_attention_norm(content + attended)
        query = content + query_position
        residual = {"none": None, "content": content, "query": query}[self.fields.residual]
        return self.cross_attention(query, latents, places=places, residual=residual, dropout_key=key_cross)


class PerceiverDecoder(nnx.Module):
    """Latents -> one embedding per object query, from every layer.

    Queries with `anchors` have places of their own; where the latents have places too, a Gaussian lets each query look
    at the latents around it first. Without layers the latents are the queries, and answer themselves.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        num_queries: int,
        fields: DecoderFields,
        *,
        latents_have_places: bool,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(dim, dtype=compute.dtype) if fields.final_norm else None
        self.dtype = compute.dtype
        if not fields.num_layers:
            self.anchors = self.query_position = self.layers = None
            return
        gaussian_width = fields.anchor_width if fields.anchors and latents_have_places else None
        self.anchors = Anchors(num_queries) if fields.anchors else None
        self.query_position = nnx.Param(normal(1.0)(rngs.params(), (num_queries, dim)))
        layer: dict = dict(gaussian_width=gaussian_width, compute=compute, rngs=rngs)
        self.layers = LayerStack(PerceiverDecoderLayer, fields.num_layers, dim, latent_dim, fields, **layer)

    def __call__(
        self, latents: Float[Array, "B N C"], latent_places: Float[Array, "N 2"] | None = None, *, dropout_key=None
    ) -> Float[Array, "L B Q D"]:
        if self.layers is None:
            decoded = latents[None]
        else:
            decoded = self._decode(latents, latent_places, dropout_key)
        return decoded if self.norm is None else self.norm(decoded)

    def _decode(self, latents, latent_places, dropout_key):
        query_position = jnp.broadcast_to(
            self.query_position[...].astype(self.dtype), (latents.shape[0], *self.query_position.shape)
        )
        places = None if self.anchors is None or latent_places is None else (self.anchors()[None], latent_places[None])
        content = jnp.zeros_like(query_position)
        return self.layers(content, query_position, latents, places, dropout_key=dropout_key, collect=True)

"""Perceiver IO: a small array of latents reads the image tokens, thinks, and is read by the object queries.

The cost is linear in the number of tokens: only cross-attentions touch them. Blocks follow arXiv:2107.14795 with
pre-norm, and DePerceiver's published choices are single values of the fields (see configs/deperceiver.py). What the
official code calls `qkv_layer_norm` is `mlp_norm` here: the norm before the MLP.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.anchors import Anchors, GaussianBias
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.attention_record import is_recording
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.layer_stack import LayerStack, apply_rematerialized
from deperceiver_jax.models.linear import dropout, split_key
from deperceiver_jax.models.mlp import MLP, exact_gelu


def _mlp(dim: int, ratio: float, gated: bool, rate: float, dtype, rngs: nnx.Rngs) -> MLP:
    return MLP([dim, round(dim * ratio), dim], activation=exact_gelu, gated=gated, dropout=rate, dtype=dtype, rngs=rngs)


class SelfAttentionLayer(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, gated_mlp: bool, dropout: float, dtype, rngs: nnx.Rngs
    ):
        self.norm = LayerNorm(dim, dtype=dtype)
        self.attention = MultiHeadAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(dim, dtype=dtype)
        self.mlp = _mlp(dim, mlp_ratio, gated_mlp, dropout, dtype, rngs)
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
        gated_mlp: bool,
        dropout: float,
        gaussian_width: float | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.query_norm = LayerNorm(query_dim, dtype=dtype)
        self.token_norm = LayerNorm(token_dim, dtype=dtype)
        self.attention = MultiHeadAttention(query_dim, num_heads, key_dim=token_dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(query_dim, dtype=dtype)
        self.mlp = _mlp(query_dim, mlp_ratio, gated_mlp, dropout, dtype, rngs)
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

    def __init__(
        self,
        token_dim: int,
        *,
        num_latents: int,
        latent_dim: int,
        latent_init: str,
        latent_scale: float,
        num_blocks: int,
        layers_per_block: int,
        share_blocks: bool,
        num_cross_attentions: int,
        share_cross_attentions: bool,
        cross_heads: int,
        self_heads: int,
        mlp_ratio: float,
        gated_mlp: bool,
        anchors: bool,
        anchor_width: float,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        if not 1 <= num_cross_attentions <= num_blocks:
            raise UserError(
                f"config.model.encoder.num_cross_attentions is {num_cross_attentions}; with {num_blocks} blocks it "
                f"can be 1 to {num_blocks}."
            )
        inits = {"normal": nnx.initializers.normal, "truncated_normal": nnx.initializers.truncated_normal}
        if latent_init not in inits:
            raise UserError(f"config.model.encoder.latent_init is {latent_init!r}; it can be {' or '.join(inits)}.")
        self.anchors = Anchors(num_latents) if anchors else None
        self.num_blocks = num_blocks
        self.layers_per_block = layers_per_block
        self.share_blocks = share_blocks
        self.num_cross_attentions = num_cross_attentions
        self.dtype = dtype
        self.latents = nnx.Param(inits[latent_init](latent_scale)(rngs.params(), (num_latents, latent_dim)))
        self.cross_attentions = nnx.List(
            [
                CrossAttentionLayer(
                    latent_dim,
                    token_dim,
                    cross_heads,
                    mlp_ratio=mlp_ratio,
                    gated_mlp=gated_mlp,
                    dropout=dropout,
                    gaussian_width=anchor_width if anchors else None,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(1 if share_cross_attentions else num_cross_attentions)
            ]
        )
        self.blocks = LayerStack(
            lambda rngs: SelfAttentionLayer(
                latent_dim,
                self_heads,
                mlp_ratio=mlp_ratio,
                gated_mlp=gated_mlp,
                dropout=dropout,
                dtype=dtype,
                rngs=rngs,
            ),
            layers_per_block * (1 if share_blocks else num_blocks),
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Float[Array, "B M C"],
        token_valid: Bool[Array, "B M"],
        key_position: Float[Array, "B M C"] | None = None,
        token_place: Float[Array, "B M 2"] | None = None,
        *,
        dropout_key=None,
    ) -> Float[Array, "B N D"]:
        """Latents after the last block; a norm is the decoder's matter. Anchors need `token_place`."""
        keys = split_key(dropout_key, 2 * self.num_blocks)
        latents = jnp.broadcast_to(self.latents[...].astype(self.dtype), (tokens.shape[0], *self.latents.shape))
        places = None if self.anchors is None else (self.anchors()[None], token_place)
        rematerialize = self.blocks.rematerialize and not is_recording()
        for block in range(self.num_cross_attentions):
            cross_attention = self.cross_attentions[min(block, len(self.cross_attentions) - 1)]
            if rematerialize:
                cross_attention = functools.partial(apply_rematerialized, cross_attention)
            latents = cross_attention(
                latents,
                tokens,
                token_valid=token_valid,
                key_position=key_position,
                places=places,
                residual=latents,
                dropout_key=keys[2 * block],
            )
            if block < self.num_cross_attentions - 1:
                latents = self._apply_block(block, latents, keys[2 * block + 1])
        return self._apply_remaining_blocks(self.num_cross_attentions - 1, latents, keys[1::2])

    def _apply_block(self, block, latents, key):
        start = 0 if self.share_blocks else block * self.layers_per_block
        return self.blocks(latents, start=start, stop=start + self.layers_per_block, dropout_key=key)

    def _apply_remaining_blocks(self, first, latents, keys):
        if not self.share_blocks:
            return self.blocks(latents, start=first * self.layers_per_block, dropout_key=keys[first])
        if self.blocks.unroll or is_recording():  # a loop of JAX would keep what happens inside to itself
            for key in keys[first:]:
                latents = self.blocks(latents, dropout_key=key)
            return latents
        keys = None if keys[first] is None else jnp.stack(keys[first:])

        def apply_block(latents, key):
            return self.blocks(latents, dropout_key=key), None

        return jax.lax.scan(apply_block, latents, keys, length=self.num_blocks - first)[0]


class PerceiverDecoderLayer(nnx.Module):
    """Object queries look at each other (optional), then at the latents.

    The published multi-layer decoder has no residual around its cross-attention and lets the query position into the
    self-attention's values; `residual` and `self_attention_value` mend either.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        *,
        self_attention: bool,
        self_attention_value: str,
        residual: str,
        cross_heads: int,
        self_heads: int,
        mlp_ratio: float,
        dropout: float,
        gaussian_width: float | None,
        dtype,
        rngs: nnx.Rngs,
    ):
        if residual not in ("none", "content", "query"):
            raise UserError(f"config.model.decoder.residual is {residual!r}; it can be none, content or query.")
        if self_attention_value not in ("query", "content"):
            raise UserError(
                f"config.model.decoder.self_attention_value is {self_attention_value!r}; it can be query or content."
            )
        self.residual = residual
        self.self_attention_value = self_attention_value
        self.has_self_attention = self_attention
        if self_attention:
            self.self_attention = MultiHeadAttention(dim, self_heads, dropout=dropout, dtype=dtype, rngs=rngs)
            self.self_attention_norm = LayerNorm(dim, dtype=dtype)
        self.cross_attention = CrossAttentionLayer(
            dim,
            latent_dim,
            cross_heads,
            mlp_ratio=mlp_ratio,
            gated_mlp=False,
            dropout=dropout,
            gaussian_width=gaussian_width,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        latents: Float[Array, "B N C"],
        places: tuple[Float[Array, "A Q 2"], Float[Array, "A N 2"]] | None = None,
        valid: Bool[Array, "B N"] | None = None,
        key_position: Float[Array, "B N C"] | None = None,
        *,
        dropout_key=None,
    ) -> Float[Array, "B Q D"]:
        key_self, key_cross = split_key(dropout_key, 2)
        if self.has_self_attention:
            query = content + query_position
            value = query if self.self_attention_value == "query" else content
            attended = self.self_attention(query, query, value, dropout_key=key_self)
            content = self.self_attention_norm(content + attended)
        query = content + query_position
        residual = {"none": None, "content": content, "query": query}[self.residual]
        return self.cross_attention(
            query,
            latents,
            token_valid=valid,
            key_position=key_position,
            places=places,
            residual=residual,
            dropout_key=key_cross,
        )


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
        *,
        num_layers: int,
        self_attention: bool,
        self_attention_value: str,
        residual: str,
        final_norm: bool,
        cross_heads: int,
        self_heads: int,
        mlp_ratio: float,
        dropout: float,
        anchors: bool,
        anchor_width: float,
        query_scale: float,
        latents_have_places: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(dim, dtype=dtype) if final_norm else None
        self.dtype = dtype
        if num_layers == 0:
            self.anchors = self.query_position = self.layers = None
            return
        gaussian_width = anchor_width if anchors and latents_have_places else None
        self.anchors = Anchors(num_queries) if anchors else None
        self.query_position = nnx.Param(nnx.initializers.normal(query_scale)(rngs.params(), (num_queries, dim)))
        self.layers = LayerStack(
            lambda rngs: PerceiverDecoderLayer(
                dim,
                latent_dim,
                self_attention=self_attention,
                self_attention_value=self_attention_value,
                residual=residual,
                cross_heads=cross_heads,
                self_heads=self_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                gaussian_width=gaussian_width,
                dtype=dtype,
                rngs=rngs,
            ),
            num_layers,
            rngs=rngs,
        )

    def __call__(
        self,
        latents: Float[Array, "B N C"],
        latent_place: Float[Array, "A N 2"] | None = None,
        valid: Bool[Array, "B N"] | None = None,
        key_position: Float[Array, "B N C"] | None = None,
        *,
        dropout_key=None,
    ) -> Float[Array, "L B Q D"]:
        """`valid` and `key_position` are for latents with image tokens after them."""
        if self.layers is None:
            decoded = latents[None]
        else:
            decoded = self._decode(latents, latent_place, valid, key_position, dropout_key)
        return decoded if self.norm is None else self.norm(decoded)

    def _decode(self, latents, latent_place, valid, key_position, dropout_key):
        query_position = jnp.broadcast_to(
            self.query_position[...].astype(self.dtype), (latents.shape[0], *self.query_position.shape)
        )
        places = None if self.anchors is None or latent_place is None else (self.anchors()[None], latent_place)
        content = jnp.zeros_like(query_position)
        context = (latents, places, valid, key_position)
        return self.layers(content, query_position, *context, dropout_key=dropout_key, collect=True)

"""SMCA's transformer: an encoder within and across scales, and a decoder whose queries look around estimated centres.

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention" (arXiv:2101.07448), section 3, and
its released code. A scale of the paper is a level here, because its Gaussians have scales too. Tokens are the cells of
all levels, one level after the other; a cell has integer coordinates (x, y) on its own level's map.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.deformable_transformer import start_alike
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.linear import split_key
from deperceiver_jax.models.mlp import MLP
from deperceiver_jax.models.spatial_modulation import SpatialModulation
from deperceiver_jax.models.transformer import DecoderLayer, TransformerLayer


class Tokens(NamedTuple):
    """The cells of all levels, one level after the other."""

    content: Float[Array, "B S D"]
    position: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each level's map, static
    strides: tuple[int, ...]  # pixels between the cells of each level, static

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of cells of each level."""
        return tuple(height * width for height, width in self.sizes)


def split_levels(x: Float[Array, "B S D"], lengths: Sequence[int]) -> list[Float[Array, "B s D"]]:
    return jnp.split(x, list(itertools.accumulate(lengths))[:-1], axis=1)


class LevelEncoderLayer(TransformerLayer):
    """Self-attention among the tokens of each level (intra-scale) or of all levels (multi-scale), then the MLP.

    All levels share the weights of the attention and of the MLP, or each has its own; norms are shared. The tokens of a
    level with weights of its own are projected by these also where they attend to other levels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_levels: int,
        share_attention: bool,
        share_mlp: bool,
        mlp_dim: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, mlp_dim=0, dropout=dropout, pre_norm=False, dtype=dtype, rngs=rngs)
        shared = dict(xavier=True, dtype=dtype, rngs=rngs)
        self.attentions = nnx.List(
            [
                MultiHeadAttention(dim, num_heads, dropout=dropout, **shared)
                for _ in range(1 if share_attention else num_levels)
            ]
        )
        self.mlps = nnx.List(
            [
                MLP([dim, mlp_dim, dim], activation=jax.nn.relu, hidden_dropout=dropout, **shared)
                for _ in range(1 if share_mlp else num_levels)
            ]
        )
        self.attention_norm = LayerNorm(dim, dtype=dtype)
        self.mlp_norm = LayerNorm(dim, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        position: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        lengths: Sequence[int],
        attend_across: bool,
        *,
        dropout_key=None,
    ) -> Float[Array, "B S D"]:
        key_probability, key_attention, key_hidden, key_mlp = split_key(dropout_key, 4)
        attend = self._attend_across if attend_across else self._attend_within
        x = self.sublayer(
            x, self.attention_norm, lambda y: attend(y, y + position, valid, lengths, key_probability), key_attention
        )
        return self.sublayer(x, self.mlp_norm, lambda y: self._expand(y, lengths, key_hidden), key_mlp)

    def _attend_within(self, y, query, valid, lengths, key):
        parts = zip(
            _of_each_level(self.attentions, lengths),
            *(split_levels(a, lengths) for a in (query, y, valid)),
            split_key(key, len(lengths)),
            strict=True,
        )
        return jnp.concatenate([a(q, q, y, key_valid=v, dropout_key=k) for a, q, y, v, k in parts], axis=1)

    def _attend_across(self, y, query, valid, lengths, key):
        if len(self.attentions) == 1:
            return self.attentions[0](query, query, y, key_valid=valid, dropout_key=key)
        parts = list(zip(self.attentions, split_levels(query, lengths), split_levels(y, lengths), strict=True))
        projected = [(a.query(q), a.key(q), a.value(y)) for a, q, y in parts]
        projected = [jnp.concatenate(levels, axis=1) for levels in zip(*projected, strict=True)]
        attended = split_levels(self.attentions[0].attend(*projected, key_valid=valid, dropout_key=key), lengths)
        return jnp.concatenate([a.out(x) for a, x in zip(self.attentions, attended, strict=True)], axis=1)

    def _expand(self, y, lengths, key):
        if len(self.mlps) == 1:
            return self.mlps[0](y, dropout_key=key)
        parts = zip(self.mlps, split_levels(y, lengths), split_key(key, len(lengths)), strict=True)
        return jnp.concatenate([mlp(y, dropout_key=k) for mlp, y, k in parts], axis=1)


def _of_each_level(modules: Sequence[nnx.Module], lengths: Sequence[int]) -> list[nnx.Module]:
    return list(modules) if len(modules) > 1 else [modules[0]] * len(lengths)


class AttentionEncoder(nnx.Module):
    """Intra-scale and multi-scale self-attention, section 3.3; with a single level it is DETR's encoder.

    `layout`: what each layer does, "intra" or "multi".
    """

    def __init__(
        self,
        dim: int,
        *,
        num_levels: int,
        layout: Sequence[str],
        num_heads: int,
        mlp_dim: int,
        share_attention: bool,
        share_mlp: bool,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        if not layout or not set(layout) <= {"intra", "multi"}:
            raise UserError(f"config.model.encoder.layout is {tuple(layout)}; each of its layers is intra or multi.")
        if mlp_dim < 1:
            raise UserError(f"config.model.encoder.mlp_dim is {mlp_dim}; it must be at least 1.")
        self.layout = tuple(layout)
        sharing = dict(num_levels=num_levels, share_attention=share_attention, share_mlp=share_mlp)
        layer = dict(mlp_dim=mlp_dim, dropout=dropout, dtype=dtype, **sharing)
        self.layers = LayerStack(
            lambda rngs: LevelEncoderLayer(dim, num_heads, rngs=rngs, **layer), len(layout), rngs=rngs
        )
        start_alike(self.layers.layers, kernels=False)

    def __call__(self, tokens: Tokens, *, dropout_key=None) -> Tokens:
        runs = [(kind, len(list(layers))) for kind, layers in itertools.groupby(self.layout)]
        x, start = tokens.content, 0
        for (kind, length), key in zip(runs, split_key(dropout_key, len(runs)), strict=True):
            constant = (tokens.position, tokens.valid, tokens.lengths, kind == "multi")
            x = self.layers(x, *constant, start=start, stop=start + length, dropout_key=key)
            start += length
        return tokens._replace(content=x)


class ModulatedDecoderLayer(DecoderLayer):
    """DETR's decoder layer, whose cross-attention is modulated and taken of each level separately (eq. 5 to 9)."""

    def __init__(self, dim: int, num_heads: int, *, modulation: dict, rngs: nnx.Rngs, **layer):
        super().__init__(dim, num_heads, pre_norm=False, rngs=rngs, **layer)
        self.modulation = SpatialModulation(dim, num_heads, **modulation, rngs=rngs)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        center: Float[Array, "B Q 2"] | None,
        memory: Tokens,
        *,
        dropout_key=None,
    ) -> Float[Array, "B Q D"]:
        """`center`: (x, y) of each query's estimated centre, in pixels of the image."""
        bias, level_weight = self.modulation(content + query_position, center, memory.sizes, memory.strides)
        return super().__call__(
            content,
            query_position,
            memory.content,
            memory.content + memory.position,
            memory.valid,
            bias=bias,
            segments=memory.lengths if len(memory.lengths) > 1 else None,
            segment_weight=level_weight,
            dropout_key=dropout_key,
        )


class ModulatedDecoder(nnx.Module):
    """Memory -> one embedding per object query, from every layer, and each query's initial centre.

    As in the released code, the centre is estimated once, from what the first layer predicts from, and every layer
    looks around it; the paper does not say in which layers it is estimated.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int,
        *,
        num_levels: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        modulation: str,
        gaussian_scale: str,
        scale_form: str,
        beta: float,
        stride_factor: bool,
        center_layers: int,
        scale_selection: bool,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        for name, value in (("num_layers", num_layers), ("center_layers", center_layers), ("mlp_dim", mlp_dim)):
            if value < 1:
                raise UserError(f"config.model.decoder.{name} is {value}; it must be at least 1.")
        gaussian = dict(gaussian_scale=gaussian_scale, scale_form=scale_form, beta=beta, stride_factor=stride_factor)
        spatial = dict(num_levels=num_levels, modulation=modulation, scale_selection=scale_selection, **gaussian)
        layer = dict(mlp_dim=mlp_dim, dropout=dropout, dtype=dtype, modulation=spatial)
        self.query_position = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_queries, dim)))
        self.layers = LayerStack(
            lambda rngs: ModulatedDecoderLayer(dim, num_heads, rngs=rngs, **layer), num_layers, rngs=rngs
        )
        self.norm = LayerNorm(dim, dtype=dtype)
        center = dict(activation=jax.nn.relu, xavier=True, dtype=jnp.float32, rngs=rngs)
        self.center = None if modulation == "none" else MLP([dim] * center_layers + [2], **center)
        self.dtype = dtype

    def __call__(
        self, memory: Tokens, image_size: Float[Array, "B 2"], *, dropout_key=None
    ) -> tuple[Float[Array, "L B Q D"], Float[Array, "Q 2"] | None]:
        """`image_size`: (width, height) of each image without padding, in pixels.

        Also returns the logit of each query's centre (x, y) in [0, 1] of the image, the same for every image; None
        without modulation.
        """
        center_logit, center = None, None
        if self.center is not None:
            first = self.layers.layer(0).modulation
            center_logit = self.center(first.norm(self.query_position[...][None]))[0]
            center = jax.nn.sigmoid(center_logit)[None] * image_size[:, None]
        query_position = self.query_position[...].astype(self.dtype)
        query_position = jnp.broadcast_to(query_position, (len(image_size), *query_position.shape))
        content = jnp.zeros_like(query_position)
        decoded = self.layers(content, query_position, center, memory, dropout_key=dropout_key, collect=True)
        return self.norm(decoded), center_logit

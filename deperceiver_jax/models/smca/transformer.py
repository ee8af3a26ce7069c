"""SMCA's transformer: an encoder within and across scales, and a decoder whose queries look around estimated centres.

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention" (arXiv:2101.07448), section 3, and
its released code. A scale of the paper is a level here, because its Gaussians have scales too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.detr.transformer import DecoderLayer
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.layers.activations import relu
from deperceiver_jax.models.layers.compute import EXACT, Compute
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack, start_alike
from deperceiver_jax.models.layers.linear import split_key
from deperceiver_jax.models.layers.mlp import MLP
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer
from deperceiver_jax.models.smca.spatial_modulation import ModulationFields, SpatialModulation


@dataclass(frozen=True)
class AttentionFields:
    """config.model.encoder"""

    layout: Sequence[str]  # what each layer attends to: "intra" or "multi"
    num_heads: int
    mlp_dim: int
    share_attention: bool
    share_mlp: bool

    def __post_init__(self):
        if not self.layout or not set(self.layout) <= {"intra", "multi"}:
            layout = tuple(self.layout)
            raise UserError(f"config.model.encoder.layout is {layout}; each of its layers is intra or multi.")
        check_at_least("config.model.encoder.mlp_dim", self.mlp_dim, 1)


class LevelEncoderLayer(TransformerLayer):
    """Self-attention among the tokens of each level (intra-scale) or of all levels (multi-scale), then the MLP.

    All levels share the weights of the attention and of the MLP, or each has its own; norms are shared. The tokens of a
    level with weights of its own are projected by these also where they attend to other levels.
    """

    def __init__(
        self, dim: int, fields: AttentionFields, *, num_levels: int, dropout: float, compute: Compute, rngs: nnx.Rngs
    ):
        shared: dict = dict(dropout=dropout, compute=compute, rngs=rngs)
        super().__init__(dim, mlp_dim=0, **shared)
        num_attentions, num_mlps = (1 if share else num_levels for share in (fields.share_attention, fields.share_mlp))
        mlp = dict(activation=relu, hidden_dropout=dropout, xavier=True, dtype=compute.dtype, rngs=rngs)
        self.attentions = nnx.List(
            [MultiHeadAttention(dim, fields.num_heads, xavier=True, **shared) for _ in range(num_attentions)]
        )
        self.mlps = nnx.List([MLP([dim, fields.mlp_dim, dim], **mlp) for _ in range(num_mlps)])
        self.attention_norm = LayerNorm(dim, dtype=compute.dtype)
        self.mlp_norm = LayerNorm(dim, dtype=compute.dtype)

    def __call__(
        self, x: Float[Array, "B S D"], image: LevelTokens, attend_across: bool, *, dropout_key=None
    ) -> Float[Array, "B S D"]:
        """`x` are the tokens as the layers before have changed them; the rest of `image` stays as it is."""
        key_probability, key_attention, key_hidden, key_mlp = split_key(dropout_key, 4)
        attend = self._attend_across if attend_across else self._attend_within
        x = self.sublayer(x, self.attention_norm, lambda y: attend(y, image, key_probability), key_attention)
        return self.sublayer(x, self.mlp_norm, lambda y: self._expand(y, image, key_hidden), key_mlp)

    def _attend_within(self, y, image: LevelTokens, key):
        parts = zip(
            _of_each_level(self.attentions, image),
            *(image.split(a) for a in (y + image.position, y, image.valid)),
            split_key(key, len(image.sizes)),
            strict=True,
        )
        return jnp.concatenate([a(q, q, y, key_valid=v, dropout_key=k) for a, q, y, v, k in parts], axis=1)

    def _attend_across(self, y, image: LevelTokens, key):
        query, masks = y + image.position, dict(key_valid=image.valid, dropout_key=key)
        if len(self.attentions) == 1:
            return self.attentions[0](query, query, y, **masks)
        parts = list(zip(self.attentions, image.split(query), image.split(y), strict=True))
        projected = [(a.query(q), a.key(q), a.value(y)) for a, q, y in parts]
        projected = [jnp.concatenate(levels, axis=1) for levels in zip(*projected, strict=True)]
        attended = image.split(self.attentions[0].attend(*projected, **masks))
        return jnp.concatenate([a.out(x) for a, x in zip(self.attentions, attended, strict=True)], axis=1)

    def _expand(self, y, image: LevelTokens, key):
        if len(self.mlps) == 1:
            return self.mlps[0](y, dropout_key=key)
        parts = zip(self.mlps, image.split(y), split_key(key, len(image.sizes)), strict=True)
        return jnp.concatenate([mlp(y, dropout_key=k) for mlp, y, k in parts], axis=1)


def _of_each_level(modules: Sequence[nnx.Module], image: LevelTokens) -> list[nnx.Module]:
    return list(modules) if len(modules) > 1 else [modules[0]] * len(image.sizes)


class AttentionEncoder(nnx.Module):
    """Intra-scale and multi-scale self-attention, section 3.3; with a single level it is DETR's encoder."""

    def __init__(
        self, dim: int, fields: AttentionFields, *, num_levels: int, dropout: float, compute: Compute, rngs: nnx.Rngs
    ):
        self.layout = tuple(fields.layout)
        layer: dict = dict(num_levels=num_levels, dropout=dropout, compute=compute, rngs=rngs)
        self.layers = LayerStack(LevelEncoderLayer, len(self.layout), dim, fields, **layer)
        start_alike(self.layers.layers, kernels=False)

    def __call__(self, image: LevelTokens, *, dropout_key=None) -> LevelTokens:
        runs = [(kind, len(list(layers))) for kind, layers in itertools.groupby(self.layout)]
        x, start = image.tokens, 0
        for (kind, length), key in zip(runs, split_key(dropout_key, len(runs)), strict=True):
            x = self.layers(x, image, kind == "multi", start=start, stop=start + length, dropout_key=key)
            start += length
        return image.replace(tokens=x)


class ModulatedDecoderLayer(DecoderLayer):
    """DETR's decoder layer, whose cross-attention is modulated and taken of each level separately (eq. 5 to 9)."""

    def __init__(
        self,
        dim: int,
        fields: ModulationFields,
        *,
        strides: Sequence[int],
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, fields.num_heads, mlp_dim=fields.mlp_dim, dropout=dropout, compute=compute, rngs=rngs)
        self.modulation = SpatialModulation(dim, fields, strides=strides, rngs=rngs)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        center: Float[Array, "B Q 2"] | None,
        memory: LevelTokens,
        *,
        dropout_key=None,
    ) -> Float[Array, "B Q D"]:
        """`center`: (x, y) of each query's estimated centre, in pixels of the image."""
        bias, level_weight = self.modulation(content + query_position, center, memory)
        several = len(memory.lengths) > 1
        return super().__call__(
            content,
            query_position,
            memory.tokens,
            memory.keys,
            memory.valid,
            bias=bias if several or bias is None else bias[0],
            segments=memory.lengths if several else None,
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
        fields: ModulationFields,
        *,
        strides: Sequence[int],
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        """`strides`: pixels between the cells of each level of the memory."""
        layer: dict = dict(strides=strides, dropout=dropout, compute=compute, rngs=rngs)
        self.query_position = nnx.Param(normal(1.0)(rngs.params(), (num_queries, dim)))
        self.layers = LayerStack(ModulatedDecoderLayer, fields.num_layers, dim, fields, **layer)
        self.norm = LayerNorm(dim, dtype=compute.dtype)
        center = dict(activation=relu, xavier=True, **EXACT, rngs=rngs)
        modulates = fields.modulation != "none"
        self.center = MLP([dim] * fields.center_layers + [2], **center) if modulates else None
        self.dtype = compute.dtype

    def __call__(
        self, memory: LevelTokens, image_size: Float[Array, "B 2"], *, dropout_key=None
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
        query_position = jnp.broadcast_to(query_position, (image_size.shape[0], *query_position.shape))
        content = jnp.zeros_like(query_position)
        decoded = self.layers(content, query_position, center, memory, dropout_key=dropout_key, collect=True)
        return self.norm(decoded), center_logit

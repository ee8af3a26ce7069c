"""Deformable DETR's transformer: an encoder whose tokens, and a decoder whose queries, look at a few points only.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), and its released code, which post-norms every sublayer and has
no final norms.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import check_at_least
from deperceiver_jax.models.attention.deformable import MultiScaleDeformableAttention
from deperceiver_jax.models.attention.query_layer import QueryLayer
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.heads.heads import RelativeHeads, no_predictions
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack, start_alike
from deperceiver_jax.models.layers.linear import split_key
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer
from deperceiver_jax.structures import Predictions


@dataclass(frozen=True)
class HalfFields:
    """What config.model.encoder and config.model.decoder have in common."""

    num_layers: int
    num_heads: int
    num_points: int  # of each head and level
    sampling: str  # see level_sampling.py
    mlp_dim: int

    def check(self, section: str) -> None:
        for name in ("num_layers", "mlp_dim"):
            check_at_least(f"{section}.{name}", getattr(self, name), 1)

    @property
    def attention(self) -> dict:
        return dict(num_heads=self.num_heads, num_points=self.num_points, sampling=self.sampling)


@dataclass(frozen=True)
class EncoderFields(HalfFields):
    """config.model.encoder"""

    across_levels: bool  # False: a token looks at its own level alone


class DeformableEncoderLayer(TransformerLayer):
    """Deformable self-attention among the tokens of all levels, then the MLP.

    Without `across_levels` a token looks at its own level alone: the paper's multi-scale inputs without multi-scale
    attention. All levels share the attention, whose offsets and weights are then those of one level.
    """

    def __init__(
        self, dim: int, fields: EncoderFields, *, num_levels: int, dropout: float, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(dim, mlp_dim=fields.mlp_dim, dropout=dropout, compute=compute, rngs=rngs)
        self.across_levels = fields.across_levels or num_levels == 1
        levels = num_levels if fields.across_levels else 1
        self.attention = MultiScaleDeformableAttention(
            dim, **fields.attention, num_levels=levels, compute=compute, rngs=rngs
        )
        self.attention_norm = LayerNorm(dim, dtype=compute.dtype)

    def __call__(self, x: Float[Array, "B S D"], image: LevelTokens, *, dropout_key=None) -> Float[Array, "B S D"]:
        """`x` are the tokens as the layers before have changed them; the rest of `image` stays as it is."""
        key_attention, key_mlp = split_key(dropout_key, 2)
        reference = image.places[:, :, None] * image.valid_share
        attend = self._attend_all if self.across_levels else self._attend_own
        x = self.sublayer(x, self.attention_norm, lambda y: attend(y, image, reference), key_attention)
        return self.mlp_sublayer(x, key_mlp)

    def _attend_all(self, x, image: LevelTokens, reference):
        return self.attention(x + image.position, reference, image.cell_size, x, image.valid, image.sizes)

    def _attend_own(self, x, image: LevelTokens, reference):
        levels = zip(*(image.split(a) for a in (x + image.position, reference, x, image.valid)), strict=True)
        attended = []
        for level, (query, points, source, valid) in enumerate(levels):
            own = slice(level, level + 1)
            points, cell = points[:, :, own], image.cell_size[:, :, own]
            attended.append(self.attention(query, points, cell, source, valid, image.sizes[own]))
        return jnp.concatenate(attended, axis=1)


class Decoded(NamedTuple):
    """What one decoder layer hands to the next, and gives as its own answer."""

    content: Float[Array, "B Q D"]
    reference: Float[Array, "B Q 4"]  # cxcywh of the valid area; around which the next layer looks and answers
    in_box: Bool[Array, ""]  # the reference is a box that scales offsets; else a point, whose size 0.5 means nothing
    predictions: Predictions | None  # with refinement


class DeformableDecoderLayer(QueryLayer):
    """Self-attention among the queries, deformable attention to the memory, then the MLP.

    With `refine` it also answers, and its boxes are the next layer's references (without gradient): iterative bounding
    box refinement, section 4.1 of the paper.
    """

    def __init__(
        self,
        dim: int,
        num_logits: int,
        fields: HalfFields,
        *,
        num_levels: int,
        refine: bool,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        layer: dict = dict(mlp_dim=fields.mlp_dim, dropout=dropout, compute=compute, rngs=rngs)
        super().__init__(dim, fields.num_heads, **layer)
        self.cross_attention = MultiScaleDeformableAttention(
            dim, **fields.attention, num_levels=num_levels, compute=compute, rngs=rngs
        )
        self.heads = RelativeHeads(dim, num_logits, rngs=rngs) if refine else None

    def __call__(
        self, decoded: Decoded, query_position: Float[Array, "B Q D"], memory: LevelTokens, *, dropout_key=None
    ) -> Decoded:
        center, size = jnp.split(decoded.reference[:, :, None] * _twice(memory.valid_share), 2, axis=-1)
        in_box = size * (0.5 / self.cross_attention.num_points)
        offset_scale = jnp.where(decoded.in_box, in_box, memory.cell_size)

        def attend_memory(x):
            source = (memory.tokens, memory.valid, memory.sizes)
            return self.cross_attention(x + query_position, center, offset_scale, *source)

        content = self.decode(decoded.content, query_position, attend_memory, split_key(dropout_key, 4))
        if self.heads is None:
            return decoded._replace(content=content)
        predictions = self.heads(content, decoded.reference)
        return Decoded(content, jax.lax.stop_gradient(predictions.boxes), jnp.ones((), bool), predictions)


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x], axis=-1)


class DeformableEncoder(nnx.Module):
    """Tokens of all levels -> memory, token by token."""

    def __init__(
        self, dim: int, fields: EncoderFields, *, num_levels: int, dropout: float, compute: Compute, rngs: nnx.Rngs
    ):
        fields.check("config.model.encoder")
        layer: dict = dict(num_levels=num_levels, dropout=dropout, compute=compute, rngs=rngs)
        self.layers = LayerStack(DeformableEncoderLayer, fields.num_layers, dim, fields, **layer)
        start_alike(self.layers.layers.mlp, kernels=False)

    def __call__(self, image: LevelTokens, *, dropout_key=None) -> LevelTokens:
        return image.replace(tokens=self.layers(image.tokens, image, dropout_key=dropout_key))


class DeformableDecoder(nnx.Module):
    """Memory and queries with their references -> Predictions of every layer.

    All layers share the heads and the references, or, with `refine`, each has heads of its own and moves the
    references. `size_bias` is the logit, before training, that the first boxes' sizes start from (see RelativeHeads).
    """

    def __init__(
        self,
        dim: int,
        num_logits: int,
        fields: HalfFields,
        *,
        num_levels: int,
        refine: bool,
        size_bias: float,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        fields.check("config.model.decoder")
        layer: dict = dict(num_levels=num_levels, refine=refine, dropout=dropout, compute=compute, rngs=rngs)
        self.layers = LayerStack(DeformableDecoderLayer, fields.num_layers, dim, num_logits, fields, **layer)
        start_alike(self.layers.layers.mlp, kernels=False)
        self.num_logits = num_logits
        if refine:
            self.heads = None
            start_alike(self.layers.layers.heads, kernels=True)
            bias = self.layers.layers.heads.box_head.mlp.layers[-1].bias
            bias[0, 2:] = size_bias
        else:
            self.heads = RelativeHeads(dim, num_logits, size_bias=size_bias, rngs=rngs)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        reference: Float[Array, "B Q 2"] | Float[Array, "B Q 4"],
        memory: LevelTokens,
        *,
        dropout_key=None,
    ) -> Predictions:
        """References are points or boxes (cxcywh), in [0, 1] of the valid area."""
        is_box = reference.shape[-1] == 4
        if not is_box:
            reference = jnp.concatenate([reference, jnp.full_like(reference, 0.5)], axis=-1)
        answers = no_predictions(content.shape[0], content.shape[1], self.num_logits) if self.heads is None else None
        start = Decoded(content, reference, jnp.asarray(is_box), answers)
        decoded = self.layers(start, query_position, memory, dropout_key=dropout_key, collect=True)
        if self.heads is None:
            return decoded.predictions
        return self.heads(decoded.content, reference[None])

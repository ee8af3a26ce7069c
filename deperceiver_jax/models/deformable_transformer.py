"""Deformable DETR's transformer: an encoder whose tokens, and a decoder whose queries, look at a few points only.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), and its released code, which post-norms every sublayer and has
no final norms. Tokens are the cells of all levels, one level after the other; every level keeps its own grid.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.heads import BoxHead, ClassHead
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.linear import split_key
from deperceiver_jax.models.multi_scale_deformable_attention import MultiScaleDeformableAttention
from deperceiver_jax.models.position_encoding import sine_waves
from deperceiver_jax.models.tokens import cell_places, concatenate_levels
from deperceiver_jax.models.transformer import TransformerLayer
from deperceiver_jax.structures import Predictions


class Pyramid(NamedTuple):
    """The tokens of all levels: where they come from and which of them are real."""

    level_sizes: tuple[tuple[int, int], ...]  # (height, width), static
    token_valid: Bool[Array, "B S"]
    extent: Float[Array, "B L 2"]  # (x, y): the image's width and height in cells
    place: Float[Array, "B S 2"]  # (x, y) of each token's centre in [0, 1] of the image, beyond 1 on padding


def make_pyramid(map_valid: Sequence[Bool[Array, "B h w"]], extent: Float[Array, "B L 2"]) -> Pyramid:
    """From the mask of each level, and the image's size in its cells, whole ones or not (tokens.py)."""
    level_sizes = tuple(valid.shape[1:] for valid in map_valid)
    places = [cell_places(*size, extent[:, level]) for level, size in enumerate(level_sizes)]
    return Pyramid(
        level_sizes=level_sizes,
        token_valid=jnp.concatenate([valid.reshape(valid.shape[0], -1) for valid in map_valid], axis=1),
        extent=extent,
        place=jnp.concatenate(places, axis=1),
    )


def token_positions(pyramid: Pyramid, level_embedding: Float[Array, "L D"]) -> Float[Array, "B S D"]:
    """Sine waves of each token's place, y first, and what says which level it is of."""
    dim = level_embedding.shape[1]
    of_level = [
        jnp.broadcast_to(level_embedding[level][None, None], (1, height * width, dim))
        for level, (height, width) in enumerate(pyramid.level_sizes)
    ]
    return sine_waves(pyramid.place[..., ::-1], dim // 2) + concatenate_levels(of_level)


def cell_size(pyramid: Pyramid) -> Float[Array, "1 1 L 2"]:
    """(1 / width, 1 / height) of each padded map: the unit of offsets around a point."""
    return jnp.asarray([(1 / width, 1 / height) for height, width in pyramid.level_sizes], jnp.float32)[None, None]


def valid_share(pyramid: Pyramid) -> Float[Array, "B 1 L 2"]:
    """(x, y): how much of each padded map is image."""
    return pyramid.extent[:, None] * cell_size(pyramid)


def inverse_sigmoid(x: Array) -> Array:
    """log(x / (1 - x)), with x and 1 - x kept from falling under 1e-5: within +-11.5."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, 1e-5) / jnp.maximum(1.0 - x, 1e-5))


class RelativeHeads(nnx.Module):
    """Class logits, and boxes relative to reference boxes (cxcywh), to whose logits the box head's answer is added.

    A reference of size 0.5 moves the centre alone: its logit is 0. Classes start at a probability of 0.01, boxes at
    their references, with sizes of sigmoid(`size_bias`).
    """

    def __init__(self, dim: int, num_logits: int, *, size_bias: float, rngs: nnx.Rngs):
        self.class_head = ClassHead(dim, num_logits, rngs=rngs)
        self.box_head = BoxHead(dim, rngs=rngs)
        self.class_head.linear.bias[...] = jnp.full(num_logits, -math.log(99))
        last = self.box_head.mlp.layers[-1]
        last.kernel[...] = jnp.zeros_like(last.kernel[...])
        last.bias[...] = jnp.asarray([0.0, 0.0, size_bias, size_bias], last.bias.dtype)

    def __call__(self, decoded: Float[Array, "*L B Q D"], reference: Float[Array, "*L B Q 4"]) -> Predictions:
        boxes = jax.nn.sigmoid(self.box_head.mlp(decoded) + inverse_sigmoid(reference))
        return Predictions(logits=self.class_head(decoded), boxes=boxes)


class DeformableEncoderLayer(TransformerLayer):
    """Deformable self-attention among the tokens of all levels, then the MLP.

    Without `across_levels` a token looks at its own level alone: the paper's multi-scale inputs without multi-scale
    attention. All levels share the attention, whose offsets and weights are then those of one level.
    """

    def __init__(
        self, dim: int, *, attention: dict, across_levels: bool, dropout: float, mlp_dim: int, dtype, rngs: nnx.Rngs
    ):
        super().__init__(dim, mlp_dim=mlp_dim, dropout=dropout, pre_norm=False, dtype=dtype, rngs=rngs)
        self.across_levels = across_levels
        attention = attention if across_levels else {**attention, "num_levels": 1}
        self.attention = MultiScaleDeformableAttention(dim, **attention, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(dim, dtype=dtype)

    def __call__(
        self, tokens: Float[Array, "B S D"], position: Float[Array, "B S D"], pyramid: Pyramid, *, dropout_key=None
    ) -> Float[Array, "B S D"]:
        key_attention, key_mlp = split_key(dropout_key, 2)
        reference = pyramid.place[:, :, None] * valid_share(pyramid)

        def attend_all(x):
            scale = cell_size(pyramid)
            return self.attention(x + position, reference, scale, x, pyramid.token_valid, pyramid.level_sizes)

        def attend_own(x):
            query, attended, start = x + position, [], 0
            for level, (height, width) in enumerate(pyramid.level_sizes):
                cells, own = slice(start, start + height * width), slice(level, level + 1)
                start = cells.stop
                places = reference[:, cells, own], cell_size(pyramid)[:, :, own]
                sources = x[:, cells], pyramid.token_valid[:, cells], pyramid.level_sizes[own]
                attended.append(self.attention(query[:, cells], *places, *sources))
            return jnp.concatenate(attended, axis=1)

        attend = attend_all if self.across_levels else attend_own
        tokens = self.sublayer(tokens, self.attention_norm, attend, key_attention)
        return self.mlp_sublayer(tokens, key_mlp)


class Decoded(NamedTuple):
    """What one decoder layer hands to the next, and gives as its own answer."""

    content: Float[Array, "B Q D"]
    reference: Float[Array, "B Q 4"]  # cxcywh of the valid area; around which the next layer looks and answers
    in_box: Bool[Array, ""]  # the reference is a box that scales offsets; else a point, whose size 0.5 means nothing
    predictions: Predictions | None  # with refinement


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention among the queries, deformable attention to the memory, then the MLP.

    With `refine` it also answers, and its boxes are the next layer's references (without gradient): iterative bounding
    box refinement, section 4.1 of the paper.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: dict,
        refine: dict | None,
        dropout: float,
        mlp_dim: int,
        dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, mlp_dim=mlp_dim, dropout=dropout, pre_norm=False, dtype=dtype, rngs=rngs)
        self.self_attention = MultiHeadAttention(
            dim, attention["num_heads"], dropout=dropout, xavier=True, dtype=dtype, rngs=rngs
        )
        self.self_attention_norm = LayerNorm(dim, dtype=dtype)
        self.cross_attention = MultiScaleDeformableAttention(dim, **attention, dtype=dtype, rngs=rngs)
        self.cross_attention_norm = LayerNorm(dim, dtype=dtype)
        self.heads = RelativeHeads(dim, **refine, rngs=rngs) if refine else None

    def __call__(
        self,
        decoded: Decoded,
        query_position: Float[Array, "B Q D"],
        memory: Float[Array, "B S D"],
        pyramid: Pyramid,
        *,
        dropout_key=None,
    ) -> Decoded:
        keys = split_key(dropout_key, 4)
        center, size = jnp.split(decoded.reference[:, :, None] * _twice(valid_share(pyramid)), 2, axis=-1)
        in_box = size * (0.5 / self.cross_attention.num_points)
        offset_scale = jnp.where(decoded.in_box, in_box, cell_size(pyramid))

        def attend_queries(x):
            query = x + query_position
            return self.self_attention(query, query, x, dropout_key=keys[0])

        def attend_memory(x):
            query = x + query_position
            return self.cross_attention(query, center, offset_scale, memory, pyramid.token_valid, pyramid.level_sizes)

        content = self.sublayer(decoded.content, self.self_attention_norm, attend_queries, keys[1])
        content = self.sublayer(content, self.cross_attention_norm, attend_memory, keys[2])
        content = self.mlp_sublayer(content, keys[3])
        if self.heads is None:
            return decoded._replace(content=content)
        predictions = self.heads(content, decoded.reference)
        return Decoded(content, jax.lax.stop_gradient(predictions.boxes), jnp.ones((), bool), predictions)


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x], axis=-1)


def start_alike(part: nnx.Module, *, kernels: bool) -> None:
    """Gives stacked layers the first one's biases and norms, or all its parameters: published layers start as copies,
    of which only the transformer's matrices are drawn anew."""
    for path, variable in nnx.iter_graph(part):
        if isinstance(variable, nnx.Variable) and (kernels or path[-1] != "kernel"):
            variable[...] = jnp.broadcast_to(variable[...][:1], variable[...].shape)


def _check(half: str, num_layers: int, mlp_dim: int) -> None:
    for name, value in (("num_layers", num_layers), ("mlp_dim", mlp_dim)):
        if value < 1:
            raise UserError(f"config.model.{half}.{name} is {value}; it must be at least 1.")


class DeformableEncoder(nnx.Module):
    """Tokens of all levels -> memory, token by token."""

    def __init__(
        self,
        dim: int,
        *,
        num_levels: int,
        across_levels: bool,
        num_layers: int,
        num_heads: int,
        num_points: int,
        sampling: str,
        mlp_dim: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        _check("encoder", num_layers, mlp_dim)
        attention = dict(num_heads=num_heads, num_levels=num_levels, num_points=num_points, sampling=sampling)
        shared = dict(dropout=dropout, mlp_dim=mlp_dim, dtype=dtype)
        layer = dict(attention=attention, across_levels=across_levels, **shared)
        self.layers = LayerStack(lambda rngs: DeformableEncoderLayer(dim, **layer, rngs=rngs), num_layers, rngs=rngs)
        start_alike(self.layers.layers.mlp, kernels=False)

    def __call__(
        self, tokens: Float[Array, "B S D"], position: Float[Array, "B S D"], pyramid: Pyramid, *, dropout_key=None
    ) -> Float[Array, "B S D"]:
        return self.layers(tokens, position, pyramid, dropout_key=dropout_key)


class DeformableDecoder(nnx.Module):
    """Memory and queries with their references -> Predictions of every layer.

    All layers share the heads and the references, or, with `refine`, each has heads of its own and moves the
    references. `size_bias` is the logit, before training, that the first boxes' sizes start from (see RelativeHeads).
    """

    def __init__(
        self,
        dim: int,
        num_logits: int,
        *,
        num_levels: int,
        refine: bool,
        size_bias: float,
        num_layers: int,
        num_heads: int,
        num_points: int,
        sampling: str,
        mlp_dim: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        _check("decoder", num_layers, mlp_dim)
        attention = dict(num_heads=num_heads, num_levels=num_levels, num_points=num_points, sampling=sampling)
        refined = dict(num_logits=num_logits, size_bias=0.0) if refine else None
        layer = dict(attention=attention, refine=refined, dropout=dropout, mlp_dim=mlp_dim, dtype=dtype)
        self.layers = LayerStack(lambda rngs: DeformableDecoderLayer(dim, **layer, rngs=rngs), num_layers, rngs=rngs)
        start_alike(self.layers.layers.mlp, kernels=False)
        self.num_logits = num_logits
        if refine:
            self.heads = None
            start_alike(self.layers.layers.heads, kernels=True)
            bias = self.layers.layers.heads.box_head.mlp.layers[-1].bias
            bias[...] = bias[...].at[0, 2:].set(size_bias)
        else:
            self.heads = RelativeHeads(dim, num_logits, size_bias=size_bias, rngs=rngs)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        reference: Float[Array, "B Q 2"] | Float[Array, "B Q 4"],
        memory: Float[Array, "B S D"],
        pyramid: Pyramid,
        *,
        dropout_key=None,
    ) -> Predictions:
        """References are points or boxes (cxcywh), in [0, 1] of the valid area."""
        batch, num_queries, _ = content.shape
        is_box = reference.shape[-1] == 4
        if not is_box:
            reference = jnp.concatenate([reference, jnp.full_like(reference, 0.5)], axis=-1)
        empty = None
        if self.heads is None:
            logits = jnp.zeros((batch, num_queries, self.num_logits), jnp.float32)
            empty = Predictions(logits=logits, boxes=jnp.zeros((batch, num_queries, 4), jnp.float32))
        start = Decoded(content, reference, jnp.asarray(is_box), empty)
        decoded = self.layers(start, query_position, memory, pyramid, dropout_key=dropout_key, collect=True)
        if self.heads is None:
            return decoded.predictions
        return self.heads(decoded.content, reference[None])

"""DePerceiver+'s decoder: latents with boxes look at one another, at the image around their boxes, and answer.

A Gaussian whose centre and widths each head predicts lets a latent look around its box first, as in SMCA
(arXiv:2101.07448); each layer corrects the boxes of the one before (Deformable DETR, arXiv:2010.04159, section 4.1),
which learns from what comes of them ("look forward twice", DINO, arXiv:2203.03605, section 3.5).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import check_above_zero, check_at_least
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.attention.query_layer import QueryLayer
from deperceiver_jax.models.deperceiver_plus.denoising import AttentionMask
from deperceiver_jax.models.features.position_encoding import sine_waves
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.heads.heads import RelativeHeads, no_predictions
from deperceiver_jax.models.kernels.log_gaussian import LogGaussian
from deperceiver_jax.models.layers.activations import relu
from deperceiver_jax.models.layers.compute import EXACT, Compute
from deperceiver_jax.models.layers.initializers import zeros
from deperceiver_jax.models.layers.layer_stack import LayerStack
from deperceiver_jax.models.layers.linear import linear, split_key
from deperceiver_jax.models.layers.mlp import MLP
from deperceiver_jax.structures import Predictions


@dataclass(frozen=True)
class LatentDecoderFields:
    """config.model.decoder; configs/deperceiver_plus.py says what each field does."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    gaussian: bool
    least_width: float
    separate_levels: bool
    refine: bool
    look_forward_twice: bool

    def __post_init__(self):
        check_at_least("config.model.decoder.num_layers", self.num_layers, 1)
        check_at_least("config.model.decoder.mlp_dim", self.mlp_dim, 0)
        check_above_zero("config.model.decoder.least_width", self.least_width)


class Latents(NamedTuple):
    """What one layer hands to the next, and gives as its own answer."""

    content: Float[Array, "B Q D"]
    reference: Float[Array, "B Q 4"]  # the box (cxcywh of the valid area) around which the next layer looks
    moved: Float[Array, "B Q 4"]  # the same box, from which it answers: its loss may reach the layer that moved the box
    predictions: Predictions


class BoxGaussian(nnx.Module):
    """Latents and their boxes -> a Gaussian for every head.

    A head's centre is the box's centre plus a predicted offset, in halves of the box; its widths are predicted factors
    of the box's halves. At the start one head looks at the middle and the others around it, on an ellipse of 0.8 of the
    box, each a quarter of the box wide, so that they can tell where an object ends.
    """

    def __init__(self, dim: int, num_heads: int, *, least_width: float, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.least_width = least_width
        angle = 2 * np.pi * np.arange(num_heads - 1) / max(num_heads - 1, 1)
        ring = np.zeros((num_heads, 2))
        ring[1:] = 0.8 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        self.offset = linear(dim, 2 * num_heads, kernel_init=zeros, bias_init=zeros, **EXACT, rngs=rngs)
        self.width = linear(dim, 2 * num_heads, kernel_init=zeros, bias_init=zeros, **EXACT, rngs=rngs)
        self.offset.bias[...] = ring.reshape(-1)
        self.width.bias[...] = np.log(0.5)

    def __call__(
        self, content: Float[Array, "B Q D"], reference: Float[Array, "B Q 4"], place: Float[Array, "B M 2"]
    ) -> LogGaussian:
        """`reference` (cxcywh) and `place` (x, y) are in [0, 1] of the valid area."""
        shape = (*content.shape[:2], self.num_heads, 2)
        half = jnp.maximum(reference[:, :, None, 2:] / 2, self.least_width)
        center = reference[:, :, None, :2] + self.offset(content).reshape(shape) * half
        inverse_width = jnp.exp(-jnp.clip(self.width(content).reshape(shape), -3.0, 3.0)) / half
        return LogGaussian(center.swapaxes(1, 2), inverse_width.swapaxes(1, 2), place)


class LatentLayer(QueryLayer):
    """Self-attention among the latents, Gaussian cross-attention to the image tokens, the MLP, and an answer.

    With `separate_levels` each level has a softmax of its own and a predicted weight, as SMCA's scale selection; else
    one softmax runs over the tokens of all levels. Without `refine` the first boxes stay the references of all layers.
    With `look_forward_twice` a box's loss moves the deltas of its own layer and of the one before.
    """

    def __init__(
        self,
        dim: int,
        num_logits: int,
        fields: LatentDecoderFields,
        *,
        num_levels: int,
        box_deltas: str,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        heads = fields.num_heads
        shared: dict = dict(dropout=dropout, compute=compute, rngs=rngs)
        super().__init__(dim, heads, mlp_dim=fields.mlp_dim, **shared)
        self.cross_attention = MultiHeadAttention(dim, heads, xavier=True, **shared)
        self.refine, self.look_forward_twice = fields.refine, fields.look_forward_twice
        self.gaussian = BoxGaussian(dim, heads, least_width=fields.least_width, rngs=rngs) if fields.gaussian else None
        separate = fields.separate_levels and num_levels > 1
        self.level_weight = linear(dim, num_levels, **EXACT, rngs=rngs) if separate else None
        self.position = MLP([2 * dim, dim, dim], activation=relu, dtype=compute.dtype, rngs=rngs)
        self.heads = RelativeHeads(dim, num_logits, box_deltas=box_deltas, rngs=rngs)

    def __call__(
        self,
        latents: Latents,
        image: LevelTokens,
        image_keys: Float[Array, "B M D"],
        attention_mask: AttentionMask,
        *,
        dropout_key=None,
    ) -> Latents:
        """`image_keys` are the tokens with their positions."""
        key_latents, key_image, *keys = split_key(dropout_key, 5)
        dim = latents.content.shape[-1]
        position = self.position(sine_waves(latents.reference, dim // 2).astype(latents.content.dtype))

        def attend_image(x):
            masks = dict(key_valid=image.valid, dropout_key=key_image)
            if self.gaussian is not None:
                masks["bias"] = self.gaussian(x, latents.reference, image.places)
            if self.level_weight is not None:
                masks["segments"] = image.lengths
                masks["segment_weight"] = jax.nn.softmax(self.level_weight(x), axis=-1)
            return self.cross_attention(x + position, image_keys, image.tokens, **masks)

        mask = attention_mask._asdict()
        content = self.decode(latents.content, position, attend_image, [key_latents, *keys], **mask)
        deltas = self.heads.box_head.mlp(content)
        predictions = Predictions(self.heads.class_head(content), self.heads.move(latents.moved, deltas))
        if not self.refine:
            return latents._replace(content=content, predictions=predictions)
        moved = self.heads.move(latents.reference, deltas)
        reference = jax.lax.stop_gradient(moved)
        return Latents(content, reference, moved if self.look_forward_twice else reference, predictions)


class LatentDecoder(nnx.Module):
    """Latents and the image's tokens -> Predictions of every layer."""

    def __init__(
        self,
        dim: int,
        num_logits: int,
        fields: LatentDecoderFields,
        *,
        num_levels: int,
        box_deltas: str,
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        layer: dict = dict(num_levels=num_levels, box_deltas=box_deltas, dropout=dropout, compute=compute, rngs=rngs)
        self.num_logits = num_logits
        self.layers = LayerStack(LatentLayer, fields.num_layers, dim, num_logits, fields, **layer)

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        reference: Float[Array, "B Q 4"],
        image: LevelTokens,
        attention_mask: AttentionMask,
        *,
        dropout_key=None,
    ) -> Predictions:
        """`reference`: the boxes that the latents start from."""
        none = no_predictions(content.shape[0], content.shape[1], self.num_logits)
        start = Latents(content, reference, reference, none)
        keys = image.keys
        return self.layers(start, image, keys, attention_mask, dropout_key=dropout_key, collect=True).predictions

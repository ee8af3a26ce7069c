"""DePerceiver+: latents that have places in the image, start from its best proposals, and answer for what they hold.

What the published DePerceiver lacks is a place for what a latent knows. Here every latent is an object query with a
box of its own; in each layer the latents look at one another, then at the image tokens around their boxes (a Gaussian
whose centre and widths each head predicts, as in SMCA, arXiv:2101.07448), and correct their boxes (Deformable DETR,
arXiv:2010.04159, section 4.1). All of it is linear in the number of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.anchors import grid_points
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.deformable_transformer import Pyramid, RelativeHeads, make_pyramid
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.linear import layer_norm, linear, split_key
from deperceiver_jax.models.mlp import MLP
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.position_encoding import sine_encoding
from deperceiver_jax.models.proposals import TokenProposals, box_encoding
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.tokens import concatenate_levels, feature_valid, flatten_map
from deperceiver_jax.models.transformer import TransformerLayer
from deperceiver_jax.structures import Predictions


class MixedLevels(nnx.Module):
    """Backbone features -> maps of `dim` channels at `strides`; with `top_down`, deeper ones are mixed into them.

    Mixing lets fine maps know what the deep layers know (feature pyramids, arXiv:1612.03144): each map of the backbone
    is projected, gets the coarser one, enlarged, and goes through a 3x3 convolution. A norm ends either way.
    """

    def __init__(
        self, channels: dict[int, int], dim: int, *, strides: Sequence[int], top_down: bool, dtype, rngs: nnx.Rngs
    ):
        self.strides = tuple(sorted(strides))
        self.top_down = top_down
        self.sources = sources(strides, top_down=top_down)
        self.projections = nnx.List([linear(channels[s], dim, dtype=dtype, rngs=rngs) for s in self.sources])
        self.convolutions = nnx.List(
            [nnx.Conv(dim, dim, (3, 3), padding=1, dtype=dtype, rngs=rngs) for _ in self.strides if top_down]
        )
        self.norms = nnx.List([layer_norm(dim, dtype=dtype, rngs=rngs) for _ in self.strides])

    def __call__(
        self, features: dict[int, Float[Array, "B h w C"]], pixel_valid: Bool[Array, "B H W"]
    ) -> tuple[list[Float[Array, "B h w D"]], list[Bool[Array, "B h w"]]]:
        """The maps and which of their cells are real. Padding is zero before the convolutions, as beyond the frame."""
        maps = {s: projection(features[s]) for projection, s in zip(self.projections, self.sources, strict=True)}
        valid = {s: feature_valid(pixel_valid, *maps[s].shape[1:3]) for s in self.strides}
        if self.top_down:
            for coarse, fine in zip(self.sources[:0:-1], self.sources[-2::-1], strict=True):
                maps[fine] = maps[fine] + enlarge(maps[coarse], *maps[fine].shape[1:3])
            for convolution, s in zip(self.convolutions, self.strides, strict=True):
                maps[s] = convolution(jnp.where(valid[s][..., None], maps[s], 0))
        return [norm(maps[s]) for norm, s in zip(self.norms, self.strides, strict=True)], list(valid.values())


def sources(strides: Sequence[int], *, top_down: bool) -> tuple[int, ...]:
    """The backbone's strides that the maps are made of: with mixing, all from the finest to the last."""
    return tuple(s for s in (4, 8, 16, 32) if s in strides or (top_down and s > min(strides)))


def enlarge(x: Float[Array, "B h w D"], height: int, width: int) -> Float[Array, "B height width D"]:
    """Every cell twice along both sides, cut to size: where a cell comes from does not depend on the padding."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


class BoxGaussian(nnx.Module):
    """The log of a Gaussian around each latent's box, for every head: where in the image the head looks first.

    A head's centre is the box's centre plus a predicted offset, in halves of the box; its widths are predicted factors
    of the box's halves. At the start the heads look at the middle and around it, in all directions.
    """

    def __init__(self, dim: int, num_heads: int, *, least_width: float, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.least_width = least_width
        angle = 2 * np.pi * np.arange(num_heads) / num_heads
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * (np.arange(num_heads) % 2)[:, None]
        zeros = nnx.initializers.zeros
        self.offset = linear(dim, 2 * num_heads, kernel_init=zeros, bias_init=zeros, dtype=jnp.float32, rngs=rngs)
        self.width = linear(dim, 2 * num_heads, kernel_init=zeros, bias_init=zeros, dtype=jnp.float32, rngs=rngs)
        self.offset.bias[...] = jnp.asarray(ring.reshape(-1), jnp.float32)

    def __call__(
        self, content: Float[Array, "B Q D"], reference: Float[Array, "B Q 4"], place: Float[Array, "B M 2"]
    ) -> Float[Array, "B H Q M"]:
        """`reference` and `place` are in [0, 1] of the valid area."""
        shape = (*content.shape[:2], self.num_heads, 2)
        center, half = reference[..., None, :2], jnp.maximum(reference[..., None, 2:] / 2, self.least_width)
        center = center + self.offset(content).reshape(shape) * half
        width = jnp.exp(jnp.clip(self.width(content).reshape(shape), -3.0, 3.0)) * half
        center, width = center.transpose(3, 0, 2, 1)[..., None], width.transpose(3, 0, 2, 1)[..., None]  # [2 B H Q 1]
        x, y = place[:, None, None, :, 0], place[:, None, None, :, 1]
        return -0.5 * (((x - center[0]) / width[0]) ** 2 + ((y - center[1]) / width[1]) ** 2)


class Latents(NamedTuple):
    """What one layer hands to the next, and gives as its own answer."""

    content: Float[Array, "B Q D"]
    reference: Float[Array, "B Q 4"]  # the box (cxcywh of the valid area) around which the next layer looks and answers
    predictions: Predictions


class AnchoredLayer(TransformerLayer):
    """Self-attention among the latents, Gaussian cross-attention to the image tokens, the MLP, and an answer.

    With `separate_levels` each level has a softmax of its own and a predicted weight, as SMCA's scale selection; else
    one softmax runs over the tokens of all levels. Without `refine` the first boxes stay the references of all layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_logits: int,
        *,
        num_levels: int,
        gaussian: bool,
        least_width: float,
        separate_levels: bool,
        refine: bool,
        dropout: float,
        mlp_dim: int,
        dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, mlp_dim=mlp_dim, dropout=dropout, pre_norm=False, dtype=dtype, rngs=rngs)
        self.refine = refine
        attention = dict(dropout=dropout, xavier=True, dtype=dtype, rngs=rngs)
        self.self_attention = MultiHeadAttention(dim, num_heads, **attention)
        self.self_attention_norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.cross_attention = MultiHeadAttention(dim, num_heads, **attention)
        self.cross_attention_norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.gaussian = BoxGaussian(dim, num_heads, least_width=least_width, rngs=rngs) if gaussian else None
        self.level_weight = linear(dim, num_levels, dtype=jnp.float32, rngs=rngs) if separate_levels else None
        self.position = MLP([2 * dim, dim, dim], activation=jax.nn.relu, dtype=dtype, rngs=rngs)
        self.heads = RelativeHeads(dim, num_logits, size_bias=0.0, rngs=rngs)

    def __call__(
        self,
        latents: Latents,
        memory: Float[Array, "B M D"],
        memory_key: Float[Array, "B M D"],
        pyramid: Pyramid,
        *,
        dropout_key=None,
    ) -> Latents:
        keys = split_key(dropout_key, 5)
        dim = memory.shape[-1]
        position = self.position(box_encoding(latents.reference, dim // 2).astype(memory.dtype))

        def attend_latents(x):
            query = x + position
            return self.self_attention(query, query, x, dropout_key=keys[0])

        def attend_image(x):
            how = dict(key_valid=pyramid.token_valid, dropout_key=keys[1])
            if self.gaussian is not None:
                how["bias"] = self.gaussian(x, latents.reference, pyramid.place)
            if self.level_weight is not None:
                how["segments"] = [height * width for height, width in pyramid.level_sizes]
                how["segment_weight"] = jax.nn.softmax(self.level_weight(x), axis=-1)
            return self.cross_attention(x + position, memory_key, memory, **how)

        content = self.sublayer(latents.content, self.self_attention_norm, attend_latents, keys[2])
        content = self.sublayer(content, self.cross_attention_norm, attend_image, keys[3])
        content = self.mlp_sublayer(content, keys[4])
        predictions = self.heads(content, latents.reference)
        reference = jax.lax.stop_gradient(predictions.boxes) if self.refine else latents.reference
        return Latents(content, reference, predictions)


class AnchoredLayers(nnx.Module):
    """Latents and the image's tokens -> Predictions of every layer."""

    def __init__(
        self,
        dim: int,
        num_logits: int,
        *,
        num_layers: int,
        num_heads: int,
        gaussian: bool,
        least_width: float,
        separate_levels: bool,
        refine: bool,
        mlp_dim: int,
        num_levels: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        if num_layers < 1:
            raise UserError(f"config.model.decoder.num_layers is {num_layers}; it must be at least 1.")
        layer = dict(gaussian=gaussian, least_width=least_width, separate_levels=separate_levels, refine=refine)
        layer |= dict(num_levels=num_levels, dropout=dropout, mlp_dim=mlp_dim, dtype=dtype)
        self.num_logits = num_logits
        self.layers = LayerStack(
            lambda rngs: AnchoredLayer(dim, num_heads, num_logits, **layer, rngs=rngs), num_layers, rngs=rngs
        )

    def __call__(
        self,
        content: Float[Array, "B Q D"],
        reference: Float[Array, "B Q 4"],
        memory: Float[Array, "B M D"],
        position: Float[Array, "B M D"],
        pyramid: Pyramid,
        *,
        dropout_key=None,
    ) -> Predictions:
        """`reference`: the boxes that the latents start from; `position` is added to the keys alone."""
        batch, num_latents, _ = content.shape
        nothing = Predictions(
            logits=jnp.zeros((batch, num_latents, self.num_logits), jnp.float32),
            boxes=jnp.zeros((batch, num_latents, 4), jnp.float32),
        )
        start = Latents(content, reference, nothing)
        layers = self.layers(start, memory, memory + position, pyramid, dropout_key=dropout_key, collect=True)
        return layers.predictions


class LearnedStart(nnx.Module):
    """Latents whose content and boxes are the same for every image at first: a grid of places, learned from there."""

    def __init__(self, dim: int, num_latents: int, *, rngs: nnx.Rngs):
        points = grid_points(num_latents)
        boxes = np.concatenate([points, np.full_like(points, 0.1)], axis=-1)
        self.boxes = nnx.Param(jnp.asarray(np.log(boxes / (1 - boxes)), jnp.float32))  # logits of cxcywh
        self.content = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (num_latents, dim)))

    def __call__(self, memory: Float[Array, "B M D"], pyramid: Pyramid):
        """(no proposals, content [B, Q, D], boxes [B, Q, 4])."""
        del pyramid
        content, boxes = self.content[...].astype(memory.dtype), jax.nn.sigmoid(self.boxes[...])
        return None, *(jnp.broadcast_to(x[None], (len(memory), *x.shape)) for x in (content, boxes))


class ProposedStart(nnx.Module):
    """Latents that start as the tokens with the best proposals, at the boxes that these propose."""

    def __init__(self, dim: int, num_latents: int, num_logits: int, *, dtype, rngs: nnx.Rngs):
        self.proposals = TokenProposals(dim, num_logits, num_proposals=num_latents, dtype=dtype, rngs=rngs)
        self.content = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.content_norm = layer_norm(dim, dtype=dtype, rngs=rngs)

    def __call__(self, memory: Float[Array, "B M D"], pyramid: Pyramid):
        """(Predictions of all tokens, content [B, Q, D], boxes [B, Q, 4])."""
        proposals, tokens, boxes = self.proposals(memory, pyramid)
        return proposals, self.content_norm(self.content(tokens)), boxes


class DePerceiverPlus(nnx.Module):
    """image -> ResNet features -> tokens -> latents with places -> Predictions of every layer.

    `start`: `learned` latents are the same for every image at first; with `proposals` every token proposes a box, all
    of which come along in `Predictions.proposals`, and the best become the latents.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_logit: bool,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        strides: Sequence[int],
        top_down: bool,
        start: str,
        backbone: dict,
        decoder: dict,
        dtype,
        rngs: nnx.Rngs,
    ):
        if start not in ("learned", "proposals"):
            raise UserError(f"config.model.start is {start!r}; it can be learned or proposals.")
        self.embed_dim = embed_dim
        self.dtype = dtype
        needed = sources(strides, top_down=top_down)
        self.backbone = build_part(ResNet, "config.model.backbone", backbone, strides=needed, dtype=dtype, rngs=rngs)
        self.levels = MixedLevels(
            self.backbone.channels, embed_dim, strides=strides, top_down=top_down, dtype=dtype, rngs=rngs
        )
        normal = nnx.initializers.normal(0.02)
        self.level_embedding = nnx.Param(normal(rngs.params(), (len(strides), embed_dim)))
        num_logits = num_classes + int(no_object_logit)
        if start == "learned":
            self.start = LearnedStart(embed_dim, num_queries, rngs=rngs)
        else:
            self.start = ProposedStart(embed_dim, num_queries, num_logits, dtype=dtype, rngs=rngs)
        self.decoder = build_part(
            AnchoredLayers,
            "config.model.decoder",
            decoder,
            dim=embed_dim,
            num_logits=num_logits,
            num_levels=len(strides),
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Pixels between the cells of each map that becomes tokens, in the order of the tokens."""
        return self.levels.strides

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        pixel_valid: Bool[Array, "B H W"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py."""
        maps, map_valid = self.levels(self.backbone(image, pixel_valid), pixel_valid)
        pyramid = make_pyramid(map_valid)
        memory = concatenate_levels([flatten_map(x) for x in maps])
        position = concatenate_levels([self._position(valid, i) for i, valid in enumerate(map_valid)])
        proposals, content, boxes = self.start(memory, pyramid)
        predictions = self.decoder(content, boxes, memory, position, pyramid, dropout_key=dropout_key)
        return predictions._replace(proposals=proposals)

    def _position(self, valid: Bool[Array, "B h w"], level: int) -> Float[Array, "B h*w D"]:
        position = flatten_map(sine_encoding(valid, self.embed_dim, offset=-0.5))
        return (position + self.level_embedding[level][None, None]).astype(self.dtype)

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
from deperceiver_jax.models.anchors import BoxGaussian, grid_points
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.deformable_transformer import Pyramid, RelativeHeads, make_pyramid, token_positions
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.linear import linear, split_key
from deperceiver_jax.models.mixed_levels import MixedLevels, sources
from deperceiver_jax.models.mlp import MLP
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.position_encoding import sine_waves
from deperceiver_jax.models.proposals import ProposedStart
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.tokens import concatenate_levels, flatten_map, size_in_cells
from deperceiver_jax.models.transformer import TransformerLayer
from deperceiver_jax.structures import Hints, Predictions


class Latents(NamedTuple):
    """What one layer hands to the next, and gives as its own answer."""

    content: Float[Array, "B Q D"]
    reference: Float[Array, "B Q 4"]  # the box (cxcywh of the valid area) around which the next layer looks and answers
    predictions: Predictions


class Sight(NamedTuple):
    """Which latents a latent sees; None where it sees all."""

    key_valid: Bool[Array, "B Q"] | None = None
    bias: Float[Array, "1 1 Q Q"] | None = None  # 0 for those in sight, else as good as minus infinity


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
        self.self_attention_norm = LayerNorm(dim, dtype=dtype)
        self.cross_attention = MultiHeadAttention(dim, num_heads, **attention)
        self.cross_attention_norm = LayerNorm(dim, dtype=dtype)
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
        sight: Sight,
        *,
        dropout_key=None,
    ) -> Latents:
        keys = split_key(dropout_key, 5)
        dim = memory.shape[-1]
        position = self.position(sine_waves(latents.reference, dim // 2).astype(memory.dtype))

        def attend_latents(x):
            query = x + position
            return self.self_attention(query, query, x, **sight._asdict(), dropout_key=keys[0])

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
        sight: Sight,
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
        layers = self.layers(start, memory, memory + position, pyramid, sight, dropout_key=dropout_key, collect=True)
        return layers.predictions


def sight_of_hints(hints: Hints, num_latents: int) -> Sight:
    """The `num_latents` that answer see one another; those behind them, from hints, see the real ones of their copy."""
    batch, copies, slots = hints.valid.shape
    copy = np.repeat(np.arange(1 + copies), [num_latents, *[slots] * copies])
    bias = np.where(copy[:, None] == copy, 0.0, -1e30).astype(np.float32)
    answers = jnp.ones((batch, num_latents), bool)
    return Sight(jnp.concatenate([answers, hints.valid.reshape(batch, -1)], axis=1), jnp.asarray(bias)[None, None])


class LearnedStart(nnx.Module):
    """Latents whose content and boxes are the same for every image at first: a grid of places, learned from there."""

    def __init__(self, dim: int, num_latents: int, *, rngs: nnx.Rngs):
        points = grid_points(num_latents)
        boxes = np.concatenate([points, np.full_like(points, 0.1)], axis=-1)
        self.boxes = nnx.Param(jnp.asarray(np.log(boxes / (1 - boxes)), jnp.float32))  # logits of cxcywh
        self.content = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (num_latents, dim)))

    def __call__(self, memory: Float[Array, "B M D"], pyramid: Pyramid, hinted: None):
        """(no proposals, content [B, Q, D], boxes [B, Q, 4])."""
        if hinted is not None:
            raise UserError("config.loss.hint_copies needs config.model.start proposals: hints start from tokens.")
        del pyramid
        content, boxes = self.content[...].astype(memory.dtype), jax.nn.sigmoid(self.boxes[...])
        return None, *(jnp.broadcast_to(x[None], (len(memory), *x.shape)) for x in (content, boxes))


def first_latents(start: nnx.Module, memory: Float[Array, "B M D"], pyramid: Pyramid, hinted, *, again: bool):
    """What `start` makes of the memory. With `again` the backward pass keeps the memory and computes the rest again."""
    if not again:
        return start(memory, pyramid, hinted)
    graphdef, arrays = nnx.split(start)
    return jax.checkpoint(lambda arrays, memory: nnx.merge(graphdef, arrays)(memory, pyramid, hinted))(arrays, memory)


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
        neck_blocks: int,
        start: str,
        backbone: dict,
        decoder: dict,
        dtype,
        rngs: nnx.Rngs,
    ):
        if start not in ("learned", "proposals"):
            raise UserError(f"config.model.start is {start!r}; it can be learned or proposals.")
        self.dtype = dtype
        needed = sources(strides, top_down=top_down)
        self.backbone = build_part(ResNet, "config.model.backbone", backbone, strides=needed, dtype=dtype, rngs=rngs)
        self.levels = MixedLevels(
            self.backbone.channels,
            embed_dim,
            strides=strides,
            top_down=top_down,
            neck_blocks=neck_blocks,
            dtype=dtype,
            rngs=rngs,
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
        hints: Hints | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py.

        Hints do not change the other answers: no latent sees those that start from one, but for their own copy's.
        """
        maps, map_valid = self.levels(self.backbone(image, pixel_valid), pixel_valid)
        pyramid = make_pyramid(map_valid, size_in_cells(pixel_valid, self.token_strides))
        memory = concatenate_levels([flatten_map(x) for x in maps])
        position = token_positions(pyramid, self.level_embedding[...]).astype(self.dtype)
        hinted = None if hints is None else hints.boxes.reshape(len(image), -1, 4)
        proposals, content, boxes = first_latents(
            self.start, memory, pyramid, hinted, again=self.decoder.layers.rematerialize
        )
        sight = Sight() if hints is None else sight_of_hints(hints, content.shape[1] - hinted.shape[1])
        predictions = self.decoder(content, boxes, memory, position, pyramid, sight, dropout_key=dropout_key)
        if hints is None:
            return predictions._replace(proposals=proposals)
        count = hinted.shape[1]
        answers = jax.tree.map(lambda x: x[:, :, :-count], predictions)
        of_hints = jax.tree.map(lambda x: x[:, :, -count:], predictions)
        return answers._replace(proposals=proposals, hinted=of_hints)

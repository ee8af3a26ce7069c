"""Two-stage detection: every token of the memory proposes a box, and the best become the queries, or DePerceiver+'s
latents.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), section 4.2, and its released code.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deformable_transformer import Pyramid
from deperceiver_jax.models.heads import BoxHead, ClassHead
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.linear import linear, xavier_uniform_init
from deperceiver_jax.models.position_encoding import sine_waves
from deperceiver_jax.structures import Predictions

FINEST_SIZE = 0.05  # width and height of the boxes that the finest tokens start from, as a share of the image


def token_boxes(pyramid: Pyramid) -> tuple[Float[Array, "B S 4"], Bool[Array, "B S"]]:
    """The box that each token starts from (cxcywh of the valid area): its place, FINEST_SIZE * 2^level wide and high.

    Valid are those of real tokens whose four numbers all lie inside (0.01, 0.99).
    """
    sizes = [
        jnp.full((1, height * width, 2), FINEST_SIZE * 2.0**level)
        for level, (height, width) in enumerate(pyramid.level_sizes)
    ]
    size = jnp.broadcast_to(jnp.concatenate(sizes, axis=1), pyramid.place.shape)
    boxes = jnp.concatenate([pyramid.place, size], axis=-1)
    return boxes, pyramid.token_valid & jnp.all((boxes > 0.01) & (boxes < 0.99), axis=-1)


def tokens_of_boxes(boxes: Float[Array, "B Q 4"], pyramid: Pyramid) -> Int32[Array, "B Q"]:
    """The token that covers the centre of each box (cxcywh of the valid area), on the level that starts at its size."""
    side = jnp.sqrt(boxes[..., 2] * boxes[..., 3])
    last = len(pyramid.level_sizes) - 1
    level = jnp.clip(jnp.round(jnp.log2(side / FINEST_SIZE)), 0, last).astype(jnp.int32)
    columns = np.array([width for _, width in pyramid.level_sizes], np.int32)
    starts = np.cumsum([0, *(height * width for height, width in pyramid.level_sizes[:-1])], dtype=np.int32)
    extent = jnp.take_along_axis(pyramid.extent, level[..., None], axis=1)
    cell = jnp.clip(jnp.floor(boxes[..., :2] * extent), 0, jnp.ceil(extent) - 1).astype(jnp.int32)
    return jnp.asarray(starts)[level] + cell[..., 1] * jnp.asarray(columns)[level] + cell[..., 0]


class TokenProposals(nnx.Module):
    """Memory -> a score and a box for every token, and which of them are best."""

    def __init__(self, dim: int, num_logits: int, *, num_proposals: int, dtype, rngs: nnx.Rngs):
        self.num_proposals = num_proposals
        self.output = _square(dim, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(dim, dtype=dtype)
        self.class_head = ClassHead(dim, num_logits, rngs=rngs)
        self.box_head = BoxHead(dim, rngs=rngs)
        self.class_head.linear.bias[...] = jnp.full(num_logits, -math.log(99))
        for parameter in (self.box_head.mlp.layers[-1].kernel, self.box_head.mlp.layers[-1].bias):
            parameter[...] = jnp.zeros_like(parameter[...])

    def __call__(
        self, memory: Float[Array, "B S D"], pyramid: Pyramid
    ) -> tuple[Predictions, Float[Array, "B S D"], Int32[Array, "B Q"], Float[Array, "B Q 4"]]:
        """(Predictions [1, B, S, ...] and content of all tokens, which are best, their boxes without gradient).

        The score is the logit of class slot 0, which the encoder's loss trains to mean any object; the other logits are
        trained to stay low. Invalid tokens propose the whole frame, (1, 1, 1, 1).
        """
        num_tokens = memory.shape[1]
        if num_tokens < self.num_proposals:
            raise UserError(
                f"config.model.num_queries is {self.num_proposals}, more than the {num_tokens} tokens that an image of "
                "this size has to propose boxes."
            )
        start, valid = token_boxes(pyramid)
        start = jnp.where(valid[..., None], start, 0.5)  # a finite logarithm, not used
        start_logit = jnp.where(valid[..., None], jnp.log(start / (1 - start)), jnp.inf)
        tokens = self.output_norm(self.output(jnp.where(valid[..., None], memory, 0)))
        logits = self.class_head(tokens)
        boxes = jax.nn.sigmoid(self.box_head.mlp(tokens) + start_logit)
        _, best = jax.lax.top_k(logits[..., 0], self.num_proposals)
        reference = jax.lax.stop_gradient(jnp.take_along_axis(boxes, best[..., None], axis=1))
        return Predictions(logits=logits[None], boxes=boxes[None]), tokens, best, reference


class Proposals(TokenProposals):
    """The best proposals become the queries of Deformable DETR, which are made from the boxes alone."""

    def __init__(self, dim: int, num_logits: int, *, num_proposals: int, dtype, rngs: nnx.Rngs):
        super().__init__(dim, num_logits, num_proposals=num_proposals, dtype=dtype, rngs=rngs)
        self.query = _square(2 * dim, dtype=dtype, rngs=rngs)
        self.query_norm = LayerNorm(2 * dim, dtype=dtype)

    def __call__(
        self, memory: Float[Array, "B S D"], pyramid: Pyramid
    ) -> tuple[Predictions, Float[Array, "B Q D"], Float[Array, "B Q D"], Float[Array, "B Q 4"]]:
        """(Predictions of all tokens, content and position of the queries, their reference boxes)."""
        predictions, _, _, reference = super().__call__(memory, pyramid)
        encoded = sine_waves(reference, memory.shape[-1] // 2).astype(memory.dtype)
        position, content = jnp.split(self.query_norm(self.query(encoded)), 2, axis=-1)
        return predictions, content, position, reference


class ProposedStart(nnx.Module):
    """Latents that start as the tokens with the best proposals, at the boxes that these propose.

    Behind them come, in training, those that start at hinted boxes, as the tokens there.
    """

    def __init__(self, dim: int, num_latents: int, num_logits: int, *, dtype, rngs: nnx.Rngs):
        self.proposals = TokenProposals(dim, num_logits, num_proposals=num_latents, dtype=dtype, rngs=rngs)
        self.content = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.content_norm = LayerNorm(dim, dtype=dtype)

    def __call__(self, memory: Float[Array, "B M D"], pyramid: Pyramid, hinted: Float[Array, "B P 4"] | None):
        """(Predictions of all tokens, content [B, Q + P, D], boxes [B, Q + P, 4])."""
        proposals, tokens, chosen, boxes = self.proposals(memory, pyramid)
        if hinted is not None:
            chosen = jnp.concatenate([chosen, tokens_of_boxes(hinted, pyramid)], axis=1)
            boxes = jnp.concatenate([boxes, hinted], axis=1)
        chosen_tokens = jnp.take_along_axis(tokens, chosen[..., None], axis=1)
        return proposals, self.content_norm(self.content(chosen_tokens)), boxes


def _square(width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(width, width, kernel_init=xavier_uniform_init(width, width), dtype=dtype, rngs=rngs)

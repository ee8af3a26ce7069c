"""Where the latents of DePerceiver+ start: at learned places, or as the image's best proposals."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.anchors import grid_points
from deperceiver_jax.models.deformable_transformer import Pyramid
from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.linear import linear
from deperceiver_jax.models.proposals import TokenProposals, tokens_of_boxes


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


def first_latents(start: nnx.Module, memory: Float[Array, "B M D"], pyramid: Pyramid, hinted, *, again: bool):
    """What `start` makes of the memory. With `again` the backward pass keeps the memory and computes the rest again."""
    if not again:
        return start(memory, pyramid, hinted)
    graphdef, arrays = nnx.split(start)
    return jax.checkpoint(lambda arrays, memory: nnx.merge(graphdef, arrays)(memory, pyramid, hinted))(arrays, memory)

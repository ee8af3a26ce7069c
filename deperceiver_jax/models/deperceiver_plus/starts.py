"""Where DePerceiver+'s latents start: the same for every image, or at the best proposals of its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deperceiver_plus.denoising import DenoisingQueries
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.features.tokens import grid_points
from deperceiver_jax.models.heads.heads import inverse_sigmoid
from deperceiver_jax.models.heads.proposals import TokenProposals, tokens_of_boxes
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.linear import linear
from deperceiver_jax.structures import Predictions

Start = tuple[Predictions | None, Float[Array, "B Q D"], Float[Array, "B Q 4"]]


class LearnedStart(nnx.Module):
    """Latents whose content and boxes are the same for every image at first: a grid of places, learned from there."""

    def __init__(self, dim: int, num_latents: int, *, rngs: nnx.Rngs):
        points = grid_points(num_latents)
        boxes = np.concatenate([points, np.full_like(points, 0.1)], axis=-1)
        self.boxes = nnx.Param(inverse_sigmoid(jnp.asarray(boxes)))  # logits of cxcywh
        self.content = nnx.Param(normal(0.02)(rngs.params(), (num_latents, dim)))

    def __call__(self, image: LevelTokens, denoising: DenoisingQueries | None) -> Start:
        """(no proposals, content, boxes)."""
        if denoising is not None:
            raise UserError("config.model.denoising.copies needs config.model.start=proposals: they start from tokens.")
        batch, dtype = image.tokens.shape[0], image.tokens.dtype
        content, boxes = self.content[...].astype(dtype), jax.nn.sigmoid(self.boxes[...])
        content, boxes = (jnp.broadcast_to(x[None], (batch, *x.shape)) for x in (content, boxes))
        return None, content, boxes


class ProposedStart(nnx.Module):
    """Latents that start as the tokens with the best proposals, at the boxes that these propose.

    Behind them come denoising ones, as the tokens at their boxes.
    """

    def __init__(self, dim: int, num_latents: int, num_logits: int, *, box_deltas: str, dtype, rngs: nnx.Rngs):
        heads: dict = dict(box_deltas=box_deltas, dtype=dtype, rngs=rngs)
        self.proposals = TokenProposals(dim, num_logits, num_proposals=num_latents, **heads)
        self.content = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.content_norm = LayerNorm(dim, dtype=dtype)

    def __call__(self, image: LevelTokens, denoising: DenoisingQueries | None) -> Start:
        """(Predictions of all tokens, content, boxes)."""
        proposals, tokens, chosen, boxes = self.proposals(image)
        if denoising is not None:
            chosen = jnp.concatenate([chosen, tokens_of_boxes(denoising.references, image)], axis=1)
            boxes = jnp.concatenate([boxes, denoising.references], axis=1)
        chosen_tokens = jnp.take_along_axis(tokens, chosen[..., None], axis=1)
        return proposals, self.content_norm(self.content(chosen_tokens)), boxes

"""Two-stage detection: every token of the memory proposes a box, and the best become queries.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), section 4.2, and its released code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.heads.heads import RelativeHeads
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.linear import linear, xavier_uniform_init
from deperceiver_jax.structures import Predictions

FINEST_SIZE = 0.05  # width and height of the boxes that the finest tokens start from, as a share of the image


def token_boxes(tokens: LevelTokens) -> tuple[Float[Array, "B S 4"], Bool[Array, "B S"]]:
    """The box that each token starts from (cxcywh of the valid area): its place, FINEST_SIZE * 2^level wide and high.

    Valid are those of real tokens whose four numbers all lie inside (0.01, 0.99).
    """
    sizes = [jnp.full((1, length, 2), FINEST_SIZE * 2.0**level) for level, length in enumerate(tokens.lengths)]
    size = jnp.broadcast_to(jnp.concatenate(sizes, axis=1), tokens.places.shape)
    boxes = jnp.concatenate([tokens.places, size], axis=-1)
    return boxes, tokens.valid & jnp.all((boxes > 0.01) & (boxes < 0.99), axis=-1)


def tokens_of_boxes(boxes: Float[Array, "B Q 4"], tokens: LevelTokens) -> Int32[Array, "B Q"]:
    """The token that covers the centre of each box (cxcywh of the valid area), on the level that starts at its size."""
    side = jnp.sqrt(boxes[..., 2] * boxes[..., 3])
    last = len(tokens.sizes) - 1
    level = jnp.clip(jnp.round(jnp.log2(side / FINEST_SIZE)), 0, last).astype(jnp.int32)
    columns = np.array([width for _, width in tokens.sizes], np.int32)
    starts = np.cumsum([0, *tokens.lengths[:-1]], dtype=np.int32)
    extent = jnp.take_along_axis(tokens.extent, level[..., None], axis=1)
    cell = jnp.clip(jnp.floor(boxes[..., :2] * extent), 0, jnp.ceil(extent) - 1).astype(jnp.int32)
    return jnp.asarray(starts)[level] + cell[..., 1] * jnp.asarray(columns)[level] + cell[..., 0]


class TokenProposals(RelativeHeads):
    """Memory -> a score and a box for every token, and which of them are best."""

    def __init__(
        self, dim: int, num_logits: int, *, num_proposals: int, box_deltas: str = "logits", dtype, rngs: nnx.Rngs
    ):
        self.num_proposals = num_proposals
        self.output = square_linear(dim, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(dim, dtype=dtype)
        super().__init__(dim, num_logits, box_deltas=box_deltas, rngs=rngs)

    def __call__(
        self, memory: LevelTokens
    ) -> tuple[Predictions, Float[Array, "B S D"], Int32[Array, "B Q"], Float[Array, "B Q 4"]]:
        """(Predictions [1, B, S, ...] and content of all tokens, which are best, their boxes without gradient).

        The score is the logit of class slot 0, which the encoder's loss trains to mean any object; the other logits are
        trained to stay low. Invalid tokens propose the whole frame, (1, 1, 1, 1).
        """
        num_tokens = memory.tokens.shape[1]
        if isinstance(num_tokens, int) and num_tokens < self.num_proposals:
            raise UserError(
                f"config.model.num_queries is {self.num_proposals}, more than the {num_tokens} tokens that an image of "
                "this size has to propose boxes."
            )
        start, valid = token_boxes(memory)
        content = self.output_norm(self.output(jnp.where(valid[..., None], memory.tokens, 0)))
        logits = self.class_head(content)
        boxes = jnp.where(valid[..., None], self.move(start, self.box_head.mlp(content)), 1.0)
        _, best = jax.lax.top_k(logits[..., 0], self.num_proposals)
        reference = jax.lax.stop_gradient(jnp.take_along_axis(boxes, best[..., None], axis=1))
        return Predictions(logits=logits[None], boxes=boxes[None]), content, best, reference


def square_linear(width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(width, width, kernel_init=xavier_uniform_init(width, width), dtype=dtype, rngs=rngs)

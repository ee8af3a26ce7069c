"""Two-stage Deformable DETR: the best proposals become the queries, which are made from their boxes alone.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), section 4.2, and its released code.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.features.position_encoding import sine_waves
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.heads.proposals import TokenProposals, square_linear
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.structures import Predictions


class Proposals(TokenProposals):
    """Memory -> proposals of all tokens, and queries."""

    def __init__(self, dim: int, num_logits: int, *, num_proposals: int, dtype, rngs: nnx.Rngs):
        super().__init__(dim, num_logits, num_proposals=num_proposals, dtype=dtype, rngs=rngs)
        self.query = square_linear(2 * dim, dtype=dtype, rngs=rngs)
        self.query_norm = LayerNorm(2 * dim, dtype=dtype)

    def __call__(
        self, memory: LevelTokens
    ) -> tuple[Predictions, Float[Array, "B Q D"], Float[Array, "B Q D"], Float[Array, "B Q 4"]]:
        """(Predictions of all tokens, content and position of the queries, their reference boxes)."""
        predictions, _, _, reference = super().__call__(memory)
        encoded = sine_waves(reference, memory.tokens.shape[-1] // 2).astype(memory.tokens.dtype)
        position, content = jnp.split(self.query_norm(self.query(encoded)), 2, axis=-1)
        return predictions, content, position, reference

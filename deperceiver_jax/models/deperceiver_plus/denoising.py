"""Denoising queries: boxes with noise, from which a detector in training learns to find the right ones unmatched.

Source: Li et al., "DN-DETR" (arXiv:2203.01305), section 4.2; the noise of sizes is logarithmic here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import check_at_least
from deperceiver_jax.structures import Targets


class DenoisingQueries(NamedTuple):
    """R noisy copies of every box slot of an image, N slots a copy."""

    boxes: Float[Array, "B R N 4"]  # cxcywh in [0, 1] of the unpadded image, not clipped to it
    valid: Bool[Array, "B R N"]

    @property
    def references(self) -> Float[Array, "B R*N 4"]:
        """The boxes in one row, copy after copy."""
        return self.boxes.reshape(len(self.boxes), -1, 4)


class AttentionMask(NamedTuple):
    """Which latents a latent attends to; None where it attends to all."""

    key_valid: Bool[Array, "B Q"] | None = None
    bias: Float[Array, "1 1 Q Q"] | None = None  # 0 for those it attends to, else as good as minus infinity


@dataclass(frozen=True)
class Denoising:
    """config.model.denoising"""

    copies: int  # of each box; 0: none
    noise: float  # at most: shares of the box for its centre, exponents for its sides

    def __post_init__(self):
        for name in ("copies", "noise"):
            check_at_least(f"config.model.denoising.{name}", getattr(self, name), 0)

    def queries(self, targets: Targets | None, key: jax.Array | None) -> DenoisingQueries | None:
        """`copies` noisy ones of each box, or None where there is nothing to copy.

        A centre moves by at most `noise` of the box's width and height, uniformly, and these grow or shrink by a factor
        of at most exp(noise). `key` is the step's; the noise depends on it alone.
        """
        if targets is None or self.copies == 0:
            return None
        shape = (targets.boxes.shape[0], self.copies, *targets.boxes.shape[1:])
        center, size = jnp.split(jnp.broadcast_to(targets.boxes[:, None], shape), 2, axis=-1)
        noise = jax.random.uniform(jax.random.fold_in(key, 1), shape, minval=-self.noise, maxval=self.noise)
        shift, growth = jnp.split(noise, 2, axis=-1)
        boxes = jnp.concatenate([center + shift * size, size * jnp.exp(growth)], axis=-1)
        valid = jnp.broadcast_to(targets.box_valid[:, None], shape[:-1])
        return DenoisingQueries(jnp.where(valid[..., None], boxes, 0.5), valid)


def denoising_mask(queries: DenoisingQueries, num_latents: int) -> AttentionMask:
    """The `num_latents` that answer attend to one another; denoising ones, behind them, to their own copy alone."""
    batch, copies, slots = queries.valid.shape
    copy = np.repeat(np.arange(1 + copies), [num_latents, *[slots] * copies])
    bias = np.where(copy[:, None] == copy, 0.0, -1e30).astype(np.float32)
    answers = jnp.ones((batch, num_latents), bool)
    key_valid = jnp.concatenate([answers, queries.valid.reshape(batch, -1)], axis=1)
    return AttentionMask(key_valid, jnp.asarray(bias)[None, None])

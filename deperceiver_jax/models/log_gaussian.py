"""The log of a Gaussian around a box, for every head and query: where in the image a latent looks first.

Attention adds it where it computes its logits, so that a block of queries needs the map of that block alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.linear import linear


class LogGaussian(NamedTuple):
    """A bias of attention that is not computed yet; the places of queries and keys are in the same frame."""

    center: Float[Array, "B H Q 2"]  # (x, y)
    inverse_width: Float[Array, "B H Q 2"]  # 1 / standard deviation; where it is 0 the map is 0
    place: Float[Array, "B K 2"]  # of the keys; without gradient

    def map(self) -> Float[Array, "B H Q K"]:
        """-((x - center_x)^2 / width_x^2 + (y - center_y)^2 / width_y^2) / 2"""
        place = jax.lax.stop_gradient(self.place)[:, None, None]
        x, y = ((place[..., i] - self.center[..., i, None]) * self.inverse_width[..., i, None] for i in (0, 1))
        return -0.5 * (jnp.square(x) + jnp.square(y))


def bias_map(bias: Float[Array, "B Hb Qb K"] | LogGaussian) -> Float[Array, "B Hb Qb K"]:
    """What is added to the logits."""
    return bias.map() if isinstance(bias, LogGaussian) else bias


def bias_of_keys(bias: Float[Array, "B Hb Qb K"] | LogGaussian | None, part: slice):
    """The same over some of the keys."""
    if isinstance(bias, LogGaussian):
        return bias._replace(place=bias.place[:, part])
    return None if bias is None else bias[..., part]


class BoxGaussian(nnx.Module):
    """Latents and their boxes -> a Gaussian for every head.

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
    ) -> LogGaussian:
        """`reference` (cxcywh) and `place` (x, y) are in [0, 1] of the valid area."""
        shape = (*content.shape[:2], self.num_heads, 2)
        half = jnp.maximum(reference[:, :, None, 2:] / 2, self.least_width)
        center = reference[:, :, None, :2] + self.offset(content).reshape(shape) * half
        inverse_width = jnp.exp(-jnp.clip(self.width(content).reshape(shape), -3.0, 3.0)) / half
        return LogGaussian(center.swapaxes(1, 2), inverse_width.swapaxes(1, 2), place)

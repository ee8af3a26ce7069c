"""Places in the image for latents and queries: learned points that start on a grid, and Gaussians around them.

A place is (x, y) in [0, 1] of the unpadded image. A Gaussian bias lets an attention look near its place first, which is
what sped DETR up in SMCA (arXiv:2101.07448). Its widths are learned, one for each head; around a box, predicted.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.linear import linear
from deperceiver_jax.models.log_gaussian import LogGaussian


def grid_points(num: int) -> np.ndarray:
    """`num` points [num, 2] spread evenly over the unit square: about sqrt(num) rows of nearly equal length."""
    rows = np.array_split(np.arange(num), max(1, math.isqrt(num)))
    points = [((i + 0.5) / len(row), (r + 0.5) / len(rows)) for r, row in enumerate(rows) for i in range(len(row))]
    return np.asarray(points, np.float32)


class Anchors(nnx.Module):
    """`num` learned places, kept inside the image by a sigmoid."""

    def __init__(self, num: int):
        points = jnp.asarray(grid_points(num))
        self.logits = nnx.Param(jnp.log(points / (1 - points)))

    def __call__(self) -> Float[Array, "num 2"]:
        return jax.nn.sigmoid(self.logits[...])


class GaussianBias(nnx.Module):
    """-distance^2 / (2 width^2) between places, to be added to attention logits; one learned width for each head.

    Widths start spread evenly in the logarithm from `width` to 4 `width`, so that heads differ from the beginning.
    """

    def __init__(self, num_heads: int, width: float):
        spread = np.linspace(0.0, math.log(4.0), num_heads) if num_heads > 1 else np.zeros(1)
        self.log_width = nnx.Param(jnp.asarray(math.log(width) + spread, jnp.float32))

    def __call__(self, query_place: Float[Array, "A Q 2"], key_place: Float[Array, "B K 2"]) -> Float[Array, "B H Q K"]:
        """A is B, or 1 where all images share the places."""
        distance = jnp.sum((query_place[:, :, None] - key_place[:, None]) ** 2, axis=-1)
        precision = 0.5 * jnp.exp(-2 * self.log_width[...])
        return -distance[:, None] * precision[None, :, None, None]


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

"""Places in the image for latents and queries: learned points that start on a grid, and Gaussians around them.

A place is (x, y) in [0, 1] of the unpadded image. A Gaussian bias lets an attention look near its place first, which is
what sped DETR up in SMCA (arXiv:2101.07448). Its widths are learned, one for each head.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.features.tokens import grid_points
from deperceiver_jax.models.heads.heads import inverse_sigmoid


class Anchors(nnx.Module):
    """`num` learned places, kept inside the image by a sigmoid."""

    def __init__(self, num: int):
        self.logits = nnx.Param(inverse_sigmoid(jnp.asarray(grid_points(num))))

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

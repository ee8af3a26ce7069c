"""The log of a Gaussian around a box, for every head and query: where in the image a latent looks first.

Attention adds it where it computes its logits, so that a block of queries needs the map of that block alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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


Bias = Float[Array, "B Hb Qb K"] | LogGaussian


def bias_map(bias: Bias | list[Bias]) -> Float[Array, "B Hb Qb K"]:
    """What is added to the logits; of a list, for one run of keys after the other."""
    if isinstance(bias, list):
        return jnp.concatenate([bias_map(part) for part in bias], axis=-1)
    return bias.map() if isinstance(bias, LogGaussian) else bias


def bias_of_keys(bias: Bias | None, part: slice):
    """The same over some of the keys."""
    if isinstance(bias, LogGaussian):
        return bias._replace(place=bias.place[:, part])
    return None if bias is None else bias[..., part]

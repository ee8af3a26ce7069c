"""Sums of what is multiplied one by one, for which XLA's CPU code may take 40 times as long as for a product."""

import jax
import jax.numpy as jnp

from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.compute import EXACT


def sum_of_products(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """jnp.sum(x * y, axis), in the precision of x; `y` has the shape of `x`, or 1 in its place. A product on CPUs."""

    def by_product(x, y):
        axes = list(range(x.ndim))
        repeated = tuple(a for a in axes if y.shape[a] != x.shape[a])
        of_y, left = ([a for a in axes if a not in out] for out in (repeated, (axis % x.ndim,)))
        return jnp.einsum(x, axes, y.squeeze(repeated), of_y, left, precision=EXACT["precision"])

    def by_sum(x, y):
        return jnp.sum(x * y, axis)

    return by_platform(x, y, cpu=by_product, default=by_sum)

"""Modulated deformable convolution (DCN v2): where each tap of a kernel reads, and how much that counts, is given.

Source: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results" (arXiv:1811.11168), equation 1. What
the taps read is what deformable attention reads: one point each, of one map (level_sampling.py).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from deperceiver_jax.models.layers.level_sampling import sample_cells


def deformable_convolution(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C/groups D"],
    offset: Float[Array, "B h w k*k 2"],
    weight: Float[Array, "B h w k*k"],
    stride: int,
    dilation: int,
    *,
    sampling: str = "gather",
) -> Float[Array, "B h w D"]:
    """A convolution (convolution.py) whose taps read `offset`, (x, y) in cells, from their places, times `weight`.

    Taps are in the kernel's order, row by row. Beyond the frame everything is zero, as padding is.
    """
    batch, height, width, channels = x.shape
    _, rows, columns, taps, _ = offset.shape
    size, groups = kernel.shape[0], channels // kernel.shape[2]
    tap = (jnp.arange(size) - size // 2) * dilation
    y = jnp.arange(rows)[:, None, None, None] * stride + tap[None, None, :, None]
    x_of = jnp.arange(columns)[None, :, None, None] * stride + tap[None, None, None, :]
    grid = jnp.stack(jnp.broadcast_arrays(x_of, y), axis=-1).reshape(1, rows, columns, taps, 2)
    place = (grid + offset).reshape(batch, -1, 1, 1, 1, 2)
    value = x.reshape(batch, height * width, 1, channels)
    read = sample_cells(value, [(height, width)], place, weight.reshape(batch, -1, 1, 1, 1), sampling=sampling)
    read = read.reshape(batch, rows, columns, taps, groups, -1)
    kernel = kernel.reshape(taps, kernel.shape[2], groups, -1)
    return jnp.einsum("bhwtgc,tcgd->bhwgd", read, kernel).reshape(batch, rows, columns, -1)

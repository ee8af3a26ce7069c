"""Depthwise convolution as a sum over shifted maps: what stands in for XLA's where parity is measured in float64.

In float64, which it was not made for, XLA:CPU takes half a second for one of 7 x 7 over 6 x 8 cells, this a hundredth.
"""

import jax
import jax.numpy as jnp


def convolution(
    x: jax.Array, kernel: jax.Array, window_strides, padding, *, rhs_dilation=(1, 1), feature_group_count=1, **options
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of x [B H W C] and kernel [h w C/groups D], in its arguments' order."""
    if feature_group_count == 1:
        options |= dict(rhs_dilation=rhs_dilation)
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    assert feature_group_count == x.shape[3] == kernel.shape[3] and tuple(rhs_dilation) == (1, 1)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    for axis in (1, 2):
        x = _windows(x, axis, kernel.shape[axis - 1], window_strides[axis - 1])
    return jnp.einsum("BHWChw,hwC->BHWC", x, kernel[:, :, 0])


def _windows(x: jax.Array, axis: int, size: int, stride: int) -> jax.Array:
    """All places of a window along an axis; what the window holds there is the last axis."""
    end = x.shape[axis] - size + 1
    slices = [jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(size)]
    return jnp.stack(slices, axis=-1)

"""What the Pallas kernels share."""

import jax
import jax.numpy as jnp

SUBLANES = 8  # rows of a register of float32, of which small arrays are padded to a multiple


def dot(a, b, axis_a: int, axis_b: int, *, precision=None):
    """The product of two matrices, summed over one axis of each, in float32."""
    axes = ((axis_a,), (axis_b,)), ((), ())
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)

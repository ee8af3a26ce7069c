"""The maximum of every window of 3 x 3 cells, two cells apart: what a ResNet's stem ends with."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deperceiver_jax.models.layers.by_platform import by_platform

TAPS = [(row, column) for row in range(3) for column in range(3)]


def max_pool(x: Float[Array, "B H W C"], *, portable: bool = False) -> Float[Array, "B h w C"]:
    """3x3, stride 2, one row and column of -infinity around. portable: without an operation on windows.

    Of several largest cells of a window the first gets the gradient, as in PyTorch.
    """
    return _of_slices(x) if portable else _max_pool(x)


def _of_windows(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))


_max_pool = jax.custom_vjp(_of_windows)


def _forward(x):
    pooled = _of_windows(x)
    return pooled, (x, pooled)


def _backward(saved, gradient):
    # XLA's CPU code for a window's largest cell takes three times as long as nine comparisons.
    return (by_platform(*saved, gradient, cpu=_backward_on_cpu, default=_backward_of_windows),)


def _backward_of_windows(x, pooled, gradient):
    del pooled
    return jax.vjp(_of_windows, x)[1](gradient)[0]


def _backward_on_cpu(x, pooled, gradient):
    """A window's cells one after the other: the first one that is its maximum takes its gradient."""
    (_, height, width, _), (batch, rows, columns, channels) = x.shape, pooled.shape
    edges = [(0, 0, 0), (1, 2 * rows - height, 0), (1, 2 * columns - width, 0), (0, 0, 0)]
    around = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), edges)
    free, of_around = jnp.ones(pooled.shape, bool), []
    for row, column in TAPS:
        ends = (batch, row + 2 * rows - 1, column + 2 * columns - 1, channels)
        first = free & (jax.lax.slice(around, (0, row, column, 0), ends, (1, 2, 2, 1)) == pooled)
        free &= ~first
        places = [(0, 0, 0), (row, 2 - row, 1), (column, 2 - column, 1), (0, 0, 0)]
        of_around.append(jax.lax.pad(jnp.where(first, gradient, 0), jnp.zeros((), gradient.dtype), places))
    return functools.reduce(jnp.add, of_around)[:, 1 : height + 1, 1 : width + 1]


_max_pool.defvjp(_forward, _backward)


def _of_slices(x):
    """Rows, then columns, two cells further each."""
    for axis in (1, 2):
        edges = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        padded, length = jnp.pad(x, edges, constant_values=-jnp.inf), x.shape[axis]
        ends = (start + (length - 1) // 2 * 2 + 1 for start in range(3))
        slices = [jax.lax.slice_in_dim(padded, start, end, 2, axis) for start, end in enumerate(ends)]
        x = jnp.maximum(jnp.maximum(slices[0], slices[1]), slices[2])
    return x

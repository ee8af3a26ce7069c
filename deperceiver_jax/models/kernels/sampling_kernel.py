"""Sums of bilinear samples on a TPU, by Pallas kernels that neither gather nor write a weight for every cell to memory.

A point's bilinear weight of a cell is max(0, 1 - |y - row|) * max(0, 1 - |x - column|). A kernel writes the points of
some queries as weights of a strip of STRIP rows of the map, in on-chip memory, and multiplies them with the strip's
cells in the matrix unit. Strips that no point of the queries touches are passed over; queries that are neighbours in
the image mostly touch the same few. Queries stand along the lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from deperceiver_jax.models.kernels.pallas import SUBLANES, call_in_blocks, dot

STRIP = 8  # rows of a map
COLUMNS = 16  # of which a strip's width is a multiple, so that it has whole rows of 128 cells
QUERIES = 512  # at a time
FAR = -2.0  # a place beyond every cell, for queries that are padding


def sample_level(
    cells: Float[Array, "B h w H D"],
    x: Float[Array, "B Q H K"],
    y: Float[Array, "B Q H K"],
    weight: Float[Array, "B Q H K"],
    dtype,
) -> Float[Array, "B Q H D"]:
    """Sum over points of weight * cells at (x, y), zero outside, in float32.

    Units are cells, 0 the centre of the first; points are at most one cell outside of the map.
    Products are of `dtype`. All arrays are float32, and so are their gradients' sums.
    """
    batch, height, width, heads, channels = cells.shape
    num_queries, num_points = x.shape[1], x.shape[3]
    columns = -(-width // COLUMNS) * COLUMNS
    cells = jnp.pad(cells, [(0, 0), (0, -height % STRIP), (0, columns - width), (0, 0), (0, 0)])
    cells = jnp.transpose(cells, (0, 3, 4, 1, 2)).reshape(batch, heads, channels, -1)
    points = jnp.transpose(jnp.concatenate([x, y, weight], axis=-1), (0, 2, 3, 1))  # B H 3K Q
    block = min(QUERIES, -(-num_queries // 128) * 128)
    pads = [(0, 0), (0, 0), (0, -3 * num_points % SUBLANES), (0, -num_queries % block)]
    points = jnp.pad(points, pads, constant_values=FAR)
    sampled = _sample(cells, points, num_points, columns, block, dtype)
    return jnp.transpose(sampled[..., :num_queries], (0, 3, 1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _sample(
    cells: Float[Array, "B H D S"], points: Float[Array, "B H R Q"], num_points: int, columns: int, block: int, dtype
) -> Float[Array, "B H D Q"]:
    """`cells`: rows of `columns` cells, whole strips. `points`: K rows of x, of y (both in cells) and of weights."""
    sizes = dict(num_points=num_points, columns=columns, block=block)
    return _call(_forward_kernel, (cells.astype(dtype), points), "kq", cells.shape[2], "q", **sizes, strips_inside=True)


def _forward(cells, points, *static):
    return _sample(cells, points, *static), (cells, points)


def _backward(num_points, columns, block, dtype, kept, gradient):
    cells, points = kept
    inputs = (cells.astype(dtype), points, gradient.astype(dtype))
    sizes = dict(num_points=num_points, columns=columns, block=block)
    d_cells = _call(_cells_kernel, inputs, "kqq", cells.shape[2], "k", **sizes, strips_inside=False)
    d_points = _call(_points_kernel, inputs, "kqq", points.shape[2], "q", **sizes, strips_inside=True)
    return d_cells, d_points


_sample.defvjp(_forward, _backward)


def _call(kernel, inputs, kinds, rows, kind, *, num_points, columns, block, strips_inside):
    """Runs `kernel` over images, heads, blocks of queries and strips. Kinds: k ends in cells, q in queries."""
    (result,) = call_in_blocks(
        functools.partial(kernel, num_points=num_points, columns=columns),
        inputs,
        kinds,
        [(rows, jnp.float32, kind)],
        scratch=[(rows, kind)],
        blocks=(block, STRIP * columns),
        keys_inside=strips_inside,
        flops=2 * inputs[0].shape[2],
        transcendentals=0,
    )
    return result


# ------------------------------------------------------------------------------------------------------- the kernels


def _dot(a, b, axis_a: int, axis_b: int):
    return dot(a, b, axis_a, axis_b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _hat(distance):
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _slope(distance):
    """The derivative of `_hat` by a point's place; at a cell's centre the one to its right, as of grid_sample."""
    return jnp.where((distance >= -1) & (distance < 0), 1.0, jnp.where((distance >= 0) & (distance < 1), -1.0, 0.0))


def _points_of(points, num_points):
    """x, y and weight of each point: [1, q]"""
    points = points[0, 0]
    for k in range(num_points):
        yield points[k : k + 1], points[num_points + k : num_points + k + 1], points[2 * num_points + k :][:1]


def _distances(place, first, number):
    """[number, q]: to a point, from each of so many rows or columns of the map, beginning with `first`."""
    cells = jax.lax.broadcasted_iota(jnp.int32, (number, place.shape[1]), 0).astype(jnp.float32)
    return place - first - cells


def _if_touched(points, first, num_points, body):
    """Runs `body` where a point's y is at most a row above the strip that begins with row `first`, or in it.

    Exactly a row above, a point has no weight there, but a slope.
    """
    y = points[0, 0][num_points : 2 * num_points]
    pl.when(jnp.max(jnp.where((y >= first - 1) & (y < first + STRIP), 1.0, 0.0)) > 0)(body)


def _first_row(axis):
    return (pl.program_id(axis) * STRIP).astype(jnp.float32)


def _weights(points, first, num_points, columns, dtype):
    """[cells of the strip, q]: what each cell counts for each query."""
    spread = [
        (_hat(_distances(x, 0, columns)), weight * _hat(_distances(y, first, STRIP)))
        for x, y, weight in _points_of(points, num_points)
    ]
    rows = [sum(across * down[row : row + 1] for across, down in spread).astype(dtype) for row in range(STRIP)]
    return jnp.concatenate(rows, axis=0)


def _start_and_finish(sums, out):
    """Zero sums before the first step inside; what stands in them after the last one is the result."""

    @pl.when(pl.program_id(3) == 0)
    def start():
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def finish():
        @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
        def write():
            out[0, 0] = sums[...]

    return finish


def _multiply(array, points, out, sums, *, strip_axis, over, num_points, columns):
    """`array` times the weights, summed over cells (`over` 0) or queries (1), and over the steps inside."""
    finish = _start_and_finish(sums, out)
    first = _first_row(strip_axis)

    def add():
        sums[...] += _dot(array[0, 0], _weights(points, first, num_points, columns, array.dtype), 1, over)

    _if_touched(points, first, num_points, add)
    finish()


def _forward_kernel(cells, points, out, sums, **sizes):
    _multiply(cells, points, out, sums, strip_axis=3, over=0, **sizes)


def _cells_kernel(cells, points, gradient, out, sums, **sizes):
    del cells
    _multiply(gradient, points, out, sums, strip_axis=2, over=1, **sizes)


def _points_kernel(cells, points, gradient, out, sums, *, num_points, columns):
    finish = _start_and_finish(sums, out)
    first = _first_row(3)

    def add():
        of_cells = _dot(cells[0, 0], gradient[0, 0], 0, 0)  # [cells, q]: of each cell's weight
        rows = [of_cells[row * columns : (row + 1) * columns] for row in range(STRIP)]
        of_x, of_y, of_weight = [], [], []
        for x, y, weight in _points_of(points, num_points):
            to_columns, to_rows = _distances(x, 0, columns), _distances(y, first, STRIP)
            across, down = _hat(to_columns), _hat(to_rows)
            of_across = sum(row * down[i : i + 1] for i, row in enumerate(rows))
            of_down = jnp.concatenate([jnp.sum(row * across, axis=0, keepdims=True) for row in rows], axis=0)
            of_x.append(weight * jnp.sum(_slope(to_columns) * of_across, axis=0, keepdims=True))
            of_y.append(weight * jnp.sum(_slope(to_rows) * of_down, axis=0, keepdims=True))
            of_weight.append(jnp.sum(down * of_down, axis=0, keepdims=True))
        found = [*of_x, *of_y, *of_weight]
        found += [jnp.zeros_like(found[0])] * (sums.shape[0] - len(found))
        sums[...] += jnp.concatenate(found, axis=0)

    _if_touched(points, first, num_points, add)
    finish()

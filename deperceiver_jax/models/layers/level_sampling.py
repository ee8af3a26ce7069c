"""Sums of a few bilinear samples of each feature map: the inside of deformable attention and deformable convolutions.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), equations 2 and 3. Two ways with one contract:

- `gather` reads the four cells around each point. Its gradient adds to such cells.
- `kernel`, for TPUs, writes a query's points as one weight for each cell of a map and multiplies weights with cells,
  strip by strip in on-chip memory (sampling_kernel.py). That is many times the arithmetic, but in the form that a TPU
  does best, and it neither gathers nor scatters.

benchmarks/README.md has the figures behind the choice.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deperceiver_jax.errors import check_choice
from deperceiver_jax.models.kernels.each_device import on_each_device
from deperceiver_jax.models.kernels.sampling_kernel import sample_level
from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.sum_of_products import sum_of_products

SAMPLINGS = ("auto", "gather")
PORTABLE = "portable"
GATHER_FLOATS = 2**22  # read at one time of each image: by 256 queries of 8 heads of 32 channels, 4 levels and points


def sample_levels(
    value: Float[Array, "B S H D"],
    level_sizes: Sequence[tuple[int, int]],
    location: Float[Array, "B Q H L K 2"],
    weight: Float[Array, "B Q H L K"],
    *,
    sampling: str,
) -> Float[Array, "B Q H D"]:
    """Sum over levels and points of weight * value at location: bilinear, and zero outside of a map.

    `location` is (x, y) of the padded map, 0 and 1 at its outer edges: the centre of cell i is (i + 0.5) / size. This
    is grid_sample with align_corners False and zero padding. For the rest see `sample_cells`.
    """
    cells = in_cells(location.astype(jnp.float32), level_sizes)
    return sample_cells(value, level_sizes, cells, weight, sampling=sampling)


def in_cells(location: Float[Array, "B Q H L K 2"], level_sizes) -> Float[Array, "B Q H L K 2"]:
    """Shares of the maps of `level_sizes` with cells as units, 0 at the centre of the first."""
    extent = jnp.asarray([(width, height) for height, width in level_sizes], jnp.float32)
    return location * extent[None, None, None, :, None] - 0.5


def sample_cells(
    value: Float[Array, "B S H D"],
    level_sizes: Sequence[tuple[int, int]],
    place: Float[Array, "B Q H L K 2"],
    weight: Float[Array, "B Q H L K"],
    *,
    sampling: str,
) -> Float[Array, "B Q H D"]:
    """Sum over levels and points of weight * value at a place: (x, y) in cells of its level, 0 at the first's centre.

    `value` holds the maps of `level_sizes` (height, width) one after the other, each row by row; head h reads its own
    channels value[:, :, h]. Samples are bilinear, and zero outside of a map. Places count in float32, the sum is in
    float32, the result has the type of `value`.

    `sampling` is gather, or auto: the kernel where the program runs on a TPU, else gather. In bfloat16, the kernel
    rounds the weight of each cell, which gather keeps in float32; in float32 they differ by the order of sums.
    portable, of Compute: gather, all queries at one time.
    """
    check_choice("sampling", sampling, (*SAMPLINGS, PORTABLE))
    gather = functools.partial(_gather, tuple(level_sizes))
    kernel = on_each_device(functools.partial(sample_by_kernel, tuple(level_sizes)))
    arguments = value, place.astype(jnp.float32), weight.astype(jnp.float32)
    if sampling == PORTABLE:
        return _gather_at_once(tuple(level_sizes), *arguments)
    if sampling == "gather":
        return gather(*arguments)
    # A switch between platforms keeps for the backward pass what each would; the checkpoint keeps the arguments.
    choose = functools.partial(by_platform, tpu=kernel, default=gather)
    return jax.checkpoint(choose)(*arguments)


def _by_level(numbers, dtype) -> Array:
    """For places (B, q, H, L, K)."""
    return jnp.asarray(numbers, dtype)[None, None, None, :, None]


def _extents(level_sizes) -> tuple[Array, Array]:
    """Height and width of each level, for places (B, q, H, L, K)."""
    height, width = zip(*level_sizes, strict=True)
    return _by_level(height, jnp.float32), _by_level(width, jnp.float32)


def _cells_before(level_sizes) -> list:
    """How many cells there are before each level's."""
    return list(itertools.accumulate((height * width for height, width in level_sizes[:-1]), initial=0))


def _clipped(place: Float[Array, "B q H L K 2"], level_sizes):
    """x and y. Beyond one cell outside everything is zero; the clip keeps far places from overflowing an integer.

    One cell outside, where a deformable convolution begins, the slope is that of the inside, as in torchvision; that of
    jnp.clip would be half of it.
    """
    height, width = _extents(level_sizes)

    def clip(x, most):
        return jnp.where(x < -1.0, -1.0, jnp.where(x > most, most, x))

    return clip(place[..., 0], width), clip(place[..., 1], height)


def _in_blocks(array: Float[Array, "B Q *rest"], size: int) -> Float[Array, "blocks B q *rest"]:
    """At most so many queries at a time, in blocks of one size; the last is filled up with zeros."""
    batch, num_queries, *rest = array.shape
    num_blocks = -(-num_queries // size)
    size = -(-num_queries // num_blocks)
    array = jnp.pad(array, [(0, 0), (0, num_blocks * size - num_queries), *[(0, 0)] * len(rest)])
    return array.reshape(batch, num_blocks, size, *rest).swapaxes(0, 1)


def _out_of_blocks(blocks: Float[Array, "blocks B q *rest"], num_queries: int) -> Float[Array, "B Q *rest"]:
    _, batch, _, *rest = blocks.shape
    return blocks.swapaxes(0, 1).reshape(batch, -1, *rest)[:, :num_queries]


def _split_levels(value: Float[Array, "B S *rest"], level_sizes) -> list[Float[Array, "B h w *rest"]]:
    maps, start = [], 0
    for height, width in level_sizes:
        cells = value[:, start : start + height * width]
        maps.append(cells.reshape(value.shape[0], height, width, *value.shape[2:]))
        start += height * width
    return maps


# --- gather ---------------------------------------------------------------------------------------------------------


def _gather(level_sizes, value, place, weight):
    return _gather_cells(level_sizes, _table(value), place, weight).astype(value.dtype)


def _gather_at_once(level_sizes, value, place, weight):
    """All queries, and levels one after the other."""
    total = 0.0
    for level, (size, cells) in enumerate(zip(level_sizes, _split_levels(value, level_sizes), strict=True)):
        of_level = (x[:, :, :, level : level + 1] for x in (place, weight))
        shares, rows = _corners([size], *of_level)
        total += jnp.sum(_read(_table(cells), rows) * shares[..., None], axis=3)
    return total.astype(value.dtype)


def _table(value: Float[Array, "B *cells H D"]) -> Float[Array, "B cells*H D"]:
    """What is read: a row a cell and head."""
    return value.astype(jnp.float32).reshape(value.shape[0], -1, value.shape[-1])


def _gather_block(level_sizes, table, place, weight):
    shares, rows = _corners(level_sizes, place, weight)
    return sum_of_products(_read(table, rows), shares[..., None], axis=3)


def _corners(level_sizes, place: Float[Array, "B q H L K 2"], weight: Float[Array, "B q H L K"]):
    """(shares, rows): what the four cells around each point weigh, and where in the table they are.

    Both are (B, q, H, 4*L*K). A cell outside of its map weighs nothing, and its row is that of the nearest one inside.
    """
    x, y = _clipped(place, level_sizes)
    left, top = jnp.floor(x), jnp.floor(y)
    height, width = _extents(level_sizes)
    columns, lines = ([(start, 1 - (at - start)), (start + 1, at - start)] for start, at in ((left, x), (top, y)))
    heads = jnp.arange(place.shape[2])[None, None, :, None, None]
    first, row_length = _by_level(_cells_before(level_sizes), jnp.int32), width.astype(jnp.int32)
    rows, shares = [], []
    for line, of_line in lines:
        for column, of_column in columns:
            outside = (line < 0) | (line >= height) | (column < 0) | (column >= width)
            inner = (jnp.clip(line, 0, height - 1), jnp.clip(column, 0, width - 1))
            down, right = (at.astype(jnp.int32) for at in inner)
            rows.append((first + down * row_length + right) * place.shape[2] + heads)
            shares.append(jnp.where(outside, 0.0, of_line * of_column * weight))
    return tuple(jnp.stack(of, axis=3).reshape(*weight.shape[:3], -1) for of in (shares, rows))


def _block_size(table: Float[Array, "B rows D"], weight: Float[Array, "B Q H L K"]) -> int:
    """How many queries read GATHER_FLOATS."""
    return max(1, GATHER_FLOATS // (4 * math.prod(weight.shape[2:]) * table.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_cells(
    level_sizes, table: Float[Array, "B rows D"], place: Float[Array, "B Q H L K 2"], weight: Float[Array, "B Q H L K"]
) -> Float[Array, "B Q H D"]:
    """Some queries at a time. What they read is read again for the gradient: keeping it for all of them would take
    1.2 GB for each encoder layer of an 800 x 1066 image."""

    def one_block(arguments):
        return _gather_block(level_sizes, table, *arguments)

    blocks = [_in_blocks(array, _block_size(table, weight)) for array in (place, weight)]
    return _out_of_blocks(jax.lax.map(one_block, blocks), place.shape[1])


def _gather_cells_forward(level_sizes, table, place, weight):
    return _gather_cells(level_sizes, table, place, weight), (table, place, weight)


def _gather_cells_backward(level_sizes, saved, gradient):
    """Written out so that each block adds to one and the same gradient of `table`, in place."""
    table, place, weight = saved

    def one_block(of_table, arguments):
        place, weight, gradient = arguments
        corners = functools.partial(_corners, level_sizes)
        shares, backward, rows = jax.vjp(corners, place, weight, has_aux=True)
        gradient = gradient[:, :, :, None]
        of_shares = sum_of_products(_read(table, rows), gradient, axis=-1)
        return _add(of_table, rows, shares[..., None] * gradient), backward(of_shares)

    blocks = [_in_blocks(array, _block_size(table, weight)) for array in (place, weight, gradient)]
    of_table, of_points = jax.lax.scan(one_block, jnp.zeros_like(table), blocks)
    return of_table, *(_out_of_blocks(of, place.shape[1]) for of in of_points)


_gather_cells.defvjp(_gather_cells_forward, _gather_cells_backward)


@jax.vmap
def _read(table: Float[Array, "rows D"], rows: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    return table.at[rows].get(mode="promise_in_bounds")


@jax.vmap
def _add(table: Float[Array, "rows D"], rows: Int[Array, "*n"], values: Float[Array, "*n D"]):
    return table.at[rows].add(values, mode="promise_in_bounds")


# --- kernel ---------------------------------------------------------------------------------------------------------


def sample_by_kernel(level_sizes, value, place, weight):
    """`sample_cells` on one TPU."""
    x, y = _clipped(place, level_sizes)
    maps = _split_levels(value.astype(jnp.float32), level_sizes)  # blocks' gradients of a cell add up in float32
    sums = (
        sample_level(cells, x[:, :, :, level], y[:, :, :, level], weight[:, :, :, level], value.dtype)
        for level, cells in enumerate(maps)
    )
    return sum(sums).astype(value.dtype)

"""Sums of a few bilinear samples of each feature map: the inside of multi-scale deformable attention.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), equations 2 and 3. Two ways with one contract:

- `gather` reads the four cells around each point. Its gradient scatters.
- `matmul` writes a query's points as one weight for each cell of a map, and multiplies all weights with all cells. That
  is hundreds of times the arithmetic, but in the form that a TPU does best, and it neither gathers nor scatters, which
  a TPU does row by row. benchmarks/README.md has the figures behind the choice.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError

MATMUL_QUERIES = 1024  # whose weights exist at one time: 55 MB each image in float32, for a map of 100 x 134


def sample_levels(
    value: Float[Array, "B S H D"],
    level_sizes: Sequence[tuple[int, int]],
    location: Float[Array, "B Q H L K 2"],
    weight: Float[Array, "B Q H L K"],
    *,
    sampling: str,
) -> Float[Array, "B Q H D"]:
    """Sum over levels and points of weight * value at location: bilinear, and zero outside of a map.

    `value` holds the maps of `level_sizes` (height, width) one after the other, each row by row; head h reads its own
    channels value[:, :, h]. `location` is (x, y) of the padded map, 0 and 1 at its outer edges, so that the centre of
    cell i is (i + 0.5) / size. Locations count in float32, the sum is in float32, the result has the type of `value`.
    This is grid_sample with align_corners False and zero padding.

    `sampling` is gather, matmul, or auto: matmul where the program runs on a TPU, else gather. In bfloat16, matmul
    rounds the weight of each cell, which gather keeps in float32; in float32 they differ by the order of sums.
    """
    check_sampling(sampling)
    by_head = value.astype(jnp.float32).transpose(2, 0, 1, 3)  # H B S D; float32 so that gradients, too, add up in it
    location = location.astype(jnp.float32).transpose(2, 3, 0, 4, 1, 5)  # H L B K Q 2
    weight = weight.astype(jnp.float32).transpose(2, 3, 0, 4, 1)
    gather = functools.partial(_gather_levels, level_sizes=tuple(level_sizes))
    matmul = functools.partial(_matmul_levels, level_sizes=tuple(level_sizes), dtype=value.dtype)
    if sampling == "auto":
        total = jax.lax.platform_dependent(by_head, location, weight, tpu=matmul, default=gather)
    else:
        total = {"gather": gather, "matmul": matmul}[sampling](by_head, location, weight)
    return total.transpose(1, 2, 0, 3).astype(value.dtype)


def check_sampling(sampling: str) -> None:
    if sampling not in ("auto", "gather", "matmul"):
        raise UserError(f"sampling is {sampling!r}; it can be auto, gather or matmul.")


def _cells_around(location: Float[Array, "*N 2"], size: tuple[int, int]):
    """(left, right_share, top, bottom_share): the upper left of the four cells around, and what the others weigh.

    Beyond one cell outside everything is zero; the clip keeps far locations from overflowing an integer.
    """
    height, width = size
    x = jnp.clip(location[..., 0] * width - 0.5, -1.0, width)
    y = jnp.clip(location[..., 1] * height - 0.5, -1.0, height)
    left, top = jnp.floor(x), jnp.floor(y)
    return left.astype(jnp.int32), x - left, top.astype(jnp.int32), y - top


def _split_levels(by_head: Float[Array, "*N S D"], level_sizes) -> list[Float[Array, "*N s D"]]:
    starts, start = [], 0
    for height, width in level_sizes:
        starts.append((start, start := start + height * width))
    return [by_head[..., first:last, :] for first, last in starts]


def _gather_levels(
    by_head: Float[Array, "H B S D"],
    location: Float[Array, "H L B K Q 2"],
    weight: Float[Array, "H L B K Q"],
    *,
    level_sizes,
) -> Float[Array, "H B Q D"]:
    total = 0.0
    for level, cells in enumerate(_split_levels(by_head, level_sizes)):
        total += _gather_level(cells, location[:, level], weight[:, level], level_sizes[level])
    return total


@functools.partial(jax.checkpoint, static_argnums=(3,))
def _gather_level(
    cells: Float[Array, "H B h*w D"],
    location: Float[Array, "H B K Q 2"],
    weight: Float[Array, "H B K Q"],
    size: tuple[int, int],
) -> Float[Array, "H B Q D"]:
    """What it reads is read again for the gradient: keeping it would take 1.2 GB for each encoder layer of an
    800 x 1066 image."""
    height, width = size
    left, right_share, top, bottom_share = _cells_around(location, size)
    total = 0.0
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = jnp.where(inside, row * width + column, 0)
            corner = jnp.take_along_axis(cells, index.reshape(*index.shape[:2], -1, 1), axis=2, mode="clip")
            share = jnp.where(inside, row_share * column_share, 0.0) * weight
            total += jnp.sum(share[..., None] * corner.reshape(*share.shape, -1), axis=2)
    return total


def _matmul_levels(
    by_head: Float[Array, "H B S D"],
    location: Float[Array, "H L B K Q 2"],
    weight: Float[Array, "H L B K Q"],
    *,
    level_sizes,
    dtype,
) -> Float[Array, "H B Q D"]:
    """Head by head and some queries at a time: the weights of all cells for all queries would take 10 GB an image."""
    num_queries = location.shape[4]
    block = min(MATMUL_QUERIES, num_queries)
    num_blocks = -(-num_queries // block)
    fill = num_blocks * block - num_queries
    location = jnp.pad(location, [(0, 0)] * 4 + [(0, fill), (0, 0)])
    weight = jnp.pad(weight, [(0, 0)] * 4 + [(0, fill)])

    def one_head(arguments):
        cells, location, weight = arguments
        location = jnp.moveaxis(location.reshape(*location.shape[:3], num_blocks, block, 2), 3, 0)
        weight = jnp.moveaxis(weight.reshape(*weight.shape[:3], num_blocks, block), 3, 0)

        @jax.checkpoint
        def one_block(arguments):
            location, weight = arguments
            total = 0.0
            for level, level_cells in enumerate(_split_levels(cells, level_sizes)):
                total += _matmul_level(level_cells.astype(dtype), location[level], weight[level], level_sizes[level])
            return total

        total = jax.lax.map(one_block, (location, weight))  # blocks B D block
        return jnp.moveaxis(total, 0, 2).reshape(*total.shape[1:3], -1)[..., :num_queries]

    return jax.lax.map(one_head, (by_head, location, weight)).swapaxes(2, 3)


def _matmul_level(
    cells: Float[Array, "B h*w D"],
    location: Float[Array, "B K Q 2"],
    weight: Float[Array, "B K Q"],
    size: tuple[int, int],
) -> Float[Array, "B D Q"]:
    """A point's weights are those of its rows times those of its columns. Queries come last, where lanes are."""
    height, width = size
    left, right_share, top, bottom_share = _cells_around(location, size)

    def shares(first, second_share, number):
        cell = jnp.arange(number)[None, None, :, None]
        first, second_share = first[..., None, :], second_share[..., None, :]
        return jnp.where(cell == first, 1 - second_share, jnp.where(cell == first + 1, second_share, 0.0))

    rows = shares(top, bottom_share, height) * weight[:, :, None]  # B K h Q
    columns = shares(left, right_share, width)
    # Not an einsum: with so few points to sum over, this stays out of the matrix unit, and fuses with what follows.
    of_cell = sum(rows[:, k, :, None] * columns[:, k, None] for k in range(rows.shape[1]))
    of_cell = of_cell.reshape(len(cells), height * width, -1).astype(cells.dtype)
    precision = jax.lax.Precision.HIGHEST if cells.dtype == jnp.float32 else None
    return jnp.einsum("bsd,bsq->bdq", cells, of_cell, precision=precision, preferred_element_type=jnp.float32)

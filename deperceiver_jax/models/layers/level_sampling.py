"""Sums of a few bilinear samples of each feature map: the inside of deformable attention and deformable convolutions.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), equations 2 and 3. Two ways with one contract:

- `gather` reads the four cells around a point as one row. Its gradient scatters such rows.
- `kernel`, for TPUs, writes a query's points as one weight for each cell of a map and multiplies weights with cells,
  strip by strip in on-chip memory (sampling_kernel.py). That is many times the arithmetic, but in the form that a TPU
  does best, and it neither gathers nor scatters.

benchmarks/README.md has the figures behind the choice.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deperceiver_jax.errors import check_choice
from deperceiver_jax.models.kernels.each_device import on_each_device
from deperceiver_jax.models.kernels.sampling_kernel import sample_level

SAMPLINGS = ("auto", "gather")
PORTABLE = "portable"
GATHER_FLOATS = 2**20  # read at one time of each image and level: 256 queries of 8 heads of 32 channels and 4 points


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
    choose = functools.partial(jax.lax.platform_dependent, tpu=kernel, default=gather)
    return jax.checkpoint(choose)(*arguments)


def _clipped(place: Float[Array, "*N 2"], size: tuple[int, int]):
    """x and y. Beyond one cell outside everything is zero; the clip keeps far places from overflowing an integer.

    One cell outside, where a deformable convolution begins, the slope is that of the inside, as in torchvision; that of
    jnp.clip would be half of it.
    """
    height, width = size

    def clip(x, most):
        return jnp.where(x < -1.0, -1.0, jnp.where(x > most, most, x))

    return clip(place[..., 0], width), clip(place[..., 1], height)


def _cells_around(place: Float[Array, "*N 2"], size: tuple[int, int]):
    """(left, right_share, top, bottom_share): the upper left of the four cells around, and what the others weigh."""
    x, y = _clipped(place, size)
    left, top = jnp.floor(x), jnp.floor(y)
    return left.astype(jnp.int32), x - left, top.astype(jnp.int32), y - top


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
    quads = [_quads(cells) for cells in _split_levels(value.astype(jnp.float32), level_sizes)]
    return _gather_quads(level_sizes, quads, place, weight).astype(value.dtype)


def _gather_at_once(level_sizes, value, place, weight):
    quads = [_quads(cells) for cells in _split_levels(value.astype(jnp.float32), level_sizes)]
    return _gather_block(level_sizes, quads, place, weight).astype(value.dtype)


def _gather_block(level_sizes, quads, place, weight):
    total = 0.0
    for level, size in enumerate(level_sizes):
        points = place[:, :, :, level]
        found = _read(quads[level], _rows(points, size))
        total += _weigh_quads(found, points, weight[:, :, :, level], size)
    return total


def _quads(cells: Float[Array, "B h w H D"]) -> Float[Array, "B rows 4*D"]:
    """Any four cells around a point as one row, zeros where they lie outside: one read for each point in place of four.

    Row ((top + 1) * (width + 2) + left + 1) * H + head has (upper left, upper right, lower left, lower right).
    """
    cells = jnp.pad(cells, [(0, 0), (1, 2), (1, 2), (0, 0), (0, 0)])
    around = [cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]]
    return jnp.concatenate(around, axis=-1).reshape(cells.shape[0], -1, 4 * cells.shape[-1])


def _rows(place: Float[Array, "B q H K 2"], size: tuple[int, int]) -> Int[Array, "B q*H*K"]:
    """Where in `_quads` the cells around each point are."""
    batch, _, num_heads, _, _ = place.shape
    left, _, top, _ = _cells_around(place, size)
    row = ((top + 1) * (size[1] + 2) + left + 1) * num_heads + jnp.arange(num_heads)[None, None, :, None]
    return row.reshape(batch, -1)


def _weigh_quads(
    found: Float[Array, "B q*H*K 4*D"], place: Float[Array, "B q H K 2"], weight: Float[Array, "B q H K"], size
) -> Float[Array, "B q H D"]:
    _, right, _, bottom = _cells_around(place, size)
    share = jnp.stack([(1 - bottom) * (1 - right), (1 - bottom) * right, bottom * (1 - right), bottom * right], axis=-1)
    found = found.reshape(*share.shape, -1)
    return jnp.sum(found * (share * weight[..., None])[..., None], axis=(3, 4))


def _block_size(quads: list[Float[Array, "B rows 4*D"]], weight: Float[Array, "B Q H L K"]) -> int:
    """How many queries read GATHER_FLOATS of a level."""
    _, _, num_heads, _, num_points = weight.shape
    return max(1, GATHER_FLOATS // (num_heads * num_points * quads[0].shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_quads(
    level_sizes, quads: list[Float[Array, "B rows 4*D"]], place: Float[Array, "B Q H L K 2"], weight
) -> Float[Array, "B Q H D"]:
    """Some queries at a time. What they read is read again for the gradient: keeping it for all of them would take
    1.2 GB for each encoder layer of an 800 x 1066 image."""

    def one_block(arguments):
        return _gather_block(level_sizes, quads, *arguments)

    blocks = [_in_blocks(array, _block_size(quads, weight)) for array in (place, weight)]
    return _out_of_blocks(jax.lax.map(one_block, blocks), place.shape[1])


def _gather_quads_forward(level_sizes, quads, place, weight):
    return _gather_quads(level_sizes, quads, place, weight), (quads, place, weight)


def _gather_quads_backward(level_sizes, saved, gradient):
    """Written out so that each block adds to one and the same gradient of `quads`, in place."""
    quads, place, weight = saved

    def one_block(of_quads, arguments):
        place, weight, gradient = arguments
        of_quads, of_place, of_weight = list(of_quads), [], []
        for level, size in enumerate(level_sizes):
            points = place[:, :, :, level]
            rows = _rows(points, size)
            weigh = functools.partial(_weigh_quads, size=size)
            _, backward = jax.vjp(weigh, _read(quads[level], rows), points, weight[:, :, :, level])
            of_found, of_points, of_level_weight = backward(gradient)
            of_quads[level] = _add(of_quads[level], rows, of_found)
            of_place.append(of_points)
            of_weight.append(of_level_weight)
        return of_quads, (jnp.stack(of_place, axis=3), jnp.stack(of_weight, axis=3))

    blocks = [_in_blocks(array, _block_size(quads, weight)) for array in (place, weight, gradient)]
    of_quads, (of_place, of_weight) = jax.lax.scan(one_block, [jnp.zeros_like(q) for q in quads], blocks)
    num_queries = place.shape[1]
    return of_quads, _out_of_blocks(of_place, num_queries), _out_of_blocks(of_weight, num_queries)


_gather_quads.defvjp(_gather_quads_forward, _gather_quads_backward)


@jax.vmap
def _read(quads, rows):
    return quads.at[rows].get(mode="promise_in_bounds")


@jax.vmap
def _add(quads, rows, values):
    return quads.at[rows].add(values, mode="promise_in_bounds")


# --- kernel ---------------------------------------------------------------------------------------------------------


def sample_by_kernel(level_sizes, value, place, weight):
    """`sample_cells` on one TPU."""
    maps = _split_levels(value.astype(jnp.float32), level_sizes)  # blocks' gradients of a cell add up in float32
    sums = (
        sample_level(cells, *_clipped(place[:, :, :, level], size), weight[:, :, :, level], value.dtype)
        for level, (cells, size) in enumerate(zip(maps, level_sizes, strict=True))
    )
    return sum(sums).astype(value.dtype)

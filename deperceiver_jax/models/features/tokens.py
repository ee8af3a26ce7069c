"""From feature maps to tokens: which of them are real, how large the image is, and their row-major order."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def feature_valid(pixel_valid: Bool[Array, "B H W"], height: int, width: int) -> Bool[Array, "B h w"]:
    """`pixel_valid` at the size of a feature map, by DETR's nearest rule: cell i looks at pixel floor(i * in / out).

    Cell (0, 0) always looks at pixel (0, 0), so no image is without a valid cell. The half-pixel rule of
    `jax.image.resize` gives another mask.
    """

    def source(size_in: int, size_out: int) -> np.ndarray:
        scale = np.float32(size_in / size_out)
        return np.minimum(np.floor(np.arange(size_out, dtype=np.float32) * scale).astype(np.int32), size_in - 1)

    if not isinstance(height, int):  # symbols, in a file for pictures of any size that the map's size divides
        steps = (1, pixel_valid.shape[1] // height, pixel_valid.shape[2] // width)
        return jax.lax.slice(pixel_valid, (0, 0, 0), pixel_valid.shape, steps)
    rows, columns = source(pixel_valid.shape[1], height), source(pixel_valid.shape[2], width)
    return pixel_valid[:, rows][:, :, columns]


def image_size(pixel_valid: Bool[Array, "B H W"]) -> Float[Array, "B 2"]:
    """(width, height) of each image, which lies at the top left, without padding."""
    columns, rows = jnp.any(pixel_valid, axis=1), jnp.any(pixel_valid, axis=2)
    return jnp.stack([columns.sum(axis=1), rows.sum(axis=1)], axis=-1).astype(jnp.float32)


def size_in_cells(pixel_valid: Bool[Array, "B H W"], strides: Sequence[int]) -> Float[Array, "B L 2"]:
    """(width, height) of each image in cells of each stride: 121 pixels are 15.125 cells of 8."""
    return image_size(pixel_valid)[:, None] / jnp.asarray(strides, jnp.float32)[None, :, None]


def size_in_whole_cells(map_valid: Sequence[Bool[Array, "B h w"]]) -> Float[Array, "B L 2"]:
    """(columns, rows) of each map that hold any image: 121 pixels are 16 cells of 8.

    As Deformable DETR's released code counts. Boxes are shares of the 121 pixels, so places are 5 % too small.
    """
    return jnp.stack([image_size(valid) for valid in map_valid], axis=1)


def cell_places(height: int, width: int, extent: Float[Array, "B 2"]) -> Float[Array, "B h*w 2"]:
    """The centre of each cell of a feature map, (x, y) in [0, 1] of the image; beyond 1 on padding.

    `extent` is the image's width and height in cells, which are seldom whole numbers.
    """
    x = (jnp.arange(width)[None] + 0.5) / extent[:, :1]
    y = (jnp.arange(height)[None] + 0.5) / extent[:, 1:]
    shape = (extent.shape[0], height, width)
    grid = [jnp.broadcast_to(x[:, None, :], shape), jnp.broadcast_to(y[:, :, None], shape)]
    return jnp.stack(grid, axis=-1).reshape(extent.shape[0], height * width, 2)


def grid_points(num: int) -> Float[np.ndarray, "num 2"]:
    """`num` points (x, y) spread evenly over the unit square: about sqrt(num) rows of nearly equal length."""
    rows = np.array_split(np.arange(num), max(1, math.isqrt(num)))
    points = [((i + 0.5) / len(row), (r + 0.5) / len(rows)) for r, row in enumerate(rows) for i in range(len(row))]
    return np.asarray(points, np.float32)


def flatten_map(features: Float[Array, "B h w C"]) -> Float[Array, "B h*w C"]:
    """Tokens in row-major order."""
    return features.reshape(features.shape[0], -1, features.shape[-1])


def concatenate_levels(levels: list) -> Array:
    """Tokens of several maps, one after the other."""
    return levels[0] if len(levels) == 1 else jnp.concatenate(levels, axis=1)

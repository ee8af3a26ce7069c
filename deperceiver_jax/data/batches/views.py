"""Several views of one picture at test time: mirrored, at other scales, in tiles; and the way of their boxes back.

`config.eval` says which. A tile is a square of stored pixels, enlarged as the whole picture is; the whole picture is
always a view, too. Source of tiles: Akyon et al., "Slicing Aided Hyper Inference", arXiv:2202.06934.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import LARGEST_SIDE, Geometry, evaluation_geometry, resized_size
from deperceiver_jax.errors import UserError, check_at_least, check_between, check_fraction

CUT_SHARE = 0.02  # of a tile: a box that ends so near to an edge inside of the picture is cut there


class Views(NamedTuple):
    """V views of N pictures, those of one picture side by side."""

    example: Int32[np.ndarray, " V"]  # which picture, ascending
    geometry: Geometry  # of the views


def check_views(config: ConfigDict) -> None:
    """Raises UserError for fields of config.eval that make no view."""
    for side in config.scales:
        if type(side) is not int:
            raise UserError(
                f"config.eval.scales is {config.scales}; it is to be short sides in pixels, as in (640, 960)."
            )
        check_between("config.eval.scales", side, 1, LARGEST_SIDE)
    if config.tiles.size:
        check_between("config.eval.tiles.size", config.tiles.size, 16, LARGEST_SIDE)
    check_fraction("config.eval.tiles.overlap", config.tiles.overlap)
    check_at_least("config.eval.tiles.size", config.tiles.size, 0)
    check_between("config.eval.merge_iou", config.merge_iou, 0, 1)


def has_several(config: ConfigDict) -> bool:
    """Whether a picture may have more than one view; `config` is config.eval."""
    return bool(config.flip or config.scales or config.tiles.size)


def plan_views(sizes: Int32[np.ndarray, "N 2"], data: ConfigDict, config: ConfigDict) -> Views:
    """All views of pictures of these (height, width); `data` is config.data and `config` config.eval."""
    sizes = np.asarray(sizes, np.int32)
    examples, flips, windows, outputs = [], [], [], []
    whole = [evaluation_geometry(sizes, data).size]
    whole += [resized_size(sizes, scale, data.eval_max_size) for scale in config.scales]
    for example, size in enumerate(sizes):
        views = [((0, 0), tuple(size.tolist()), scaled[example]) for scaled in whole]
        for corner, extent in _tiles(size, config.tiles):
            views.append((corner, extent, resized_size(np.array(extent), data.eval_scale, data.eval_max_size)))
        for flip in (False, True) if config.flip else (False,):
            for corner, extent, output in views:
                examples.append(example)
                flips.append(flip)
                windows.append((corner, extent))
                outputs.append(output)
    example = np.array(examples, np.int32)
    original, window = sizes[example], np.array(windows, np.int32).reshape(-1, 2, 2)
    cropped = (window[:, 1] != original).any(1)
    geometry = Geometry(original, np.array(flips), cropped, original, window[:, 0], window[:, 1], np.array(outputs))
    return Views(example, geometry)


def _tiles(size: Int32[np.ndarray, "2"], config: ConfigDict) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """((top, left), (height, width)) of the tiles of a picture, none where it is no larger than one.

    Neighbours overlap by `overlap` of a tile at least; those at the far edges end with the picture.
    """
    if not config.size or size.max() <= config.size:
        return
    extent = np.minimum(size, config.size)
    corners = []
    for side, tile in zip(size.tolist(), extent.tolist(), strict=True):
        count = 1 + int(np.ceil((side - tile) / max(tile * (1 - config.overlap), 1)))
        corners.append(np.linspace(0, side - tile, count).round().astype(int).tolist())
    for top in corners[0]:
        for left in corners[1]:
            yield (top, left), tuple(extent.tolist())


def to_picture(
    boxes: Float32[np.ndarray, "V K 4"], geometry: Geometry
) -> tuple[Float32[np.ndarray, "V K 4"], Bool[np.ndarray, "V K"]]:
    """(boxes in the picture, which of them its tile cuts), of boxes that are scaled as if each view were the picture.

    An object that the edge of a tile cuts is left to the tile, or the whole picture, that sees all of it.
    """

    def corners(pair):
        return pair.astype(np.float32)[:, None, [1, 0, 1, 0]]

    extent, original, corner = map(corners, (geometry.extent, geometry.original, geometry.corner))
    within = boxes * (extent / original)
    margin, inside = CUT_SHARE * extent, within + corner
    low = (within < margin) & (corner > 0)
    high = (within > extent - margin) & (corner + extent < original)
    cut = low[..., :2].any(-1) | high[..., 2:].any(-1)
    mirrored = inside[..., [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32) + original * np.array(
        [1, 0, 1, 0], np.float32
    )
    return np.where(geometry.flip[:, None, None], mirrored, inside), cut

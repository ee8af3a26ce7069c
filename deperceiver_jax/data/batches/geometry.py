"""Flip, scale and crop as numbers: where each image of an epoch comes from and how large it becomes, before any pixel.

DETR's training augmentation (arXiv:2005.12872, appendix A.4): a horizontal flip, then either (A) a resize of the
short side to one of `scales`, or (B) a resize to one of `crop_scales`, a random crop of crop_min to crop_max pixels a
side, and resize A. The numbers of an example depend on (seed, epoch, example, image size) alone, so an epoch's output
sizes are known in advance (plan.py), every host and every restart draws the same ones, and the two resizes of B become
one crop and one resize of the stored pixels (pixels.py). Boxes still go through all steps, each with its rounded sizes.
"""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError, check_at_least, check_between

LARGEST_SIDE = 100_000  # pixels that a field may ask for
GEOMETRY, ORDER, BATCH_ORDER, PASTED = 0, 1, 2, 4  # what a stream of random numbers is for


@dataclass(frozen=True)
class Geometry:
    """The way of N images into their outputs. Sizes are (height, width) in pixels."""

    original: Int32[np.ndarray, "N 2"]  # the stored image
    flip: Bool[np.ndarray, " N"]  # mirrored left to right, before everything else
    cropped: Bool[np.ndarray, " N"]  # branch B
    resized: Int32[np.ndarray, "N 2"]  # after the resize before the crop; the stored size in branch A
    corner: Int32[np.ndarray, "N 2"]  # (top, left) of the crop in the resized image
    extent: Int32[np.ndarray, "N 2"]  # size of the crop; the stored size in branch A
    size: Int32[np.ndarray, "N 2"]  # the output

    def take(self, examples) -> "Geometry":
        """The geometry of these examples."""
        return Geometry(*(getattr(self, field.name)[examples] for field in fields(self)))

    def window(self) -> Float64[np.ndarray, "N 4"]:
        """(top, left, bottom, right) of each output in pixels of the stored, flipped image; not rounded."""
        scale = self.original / self.resized
        return np.concatenate([self.corner * scale, (self.corner + self.extent) * scale], axis=1)


def uniform(seed: int, epoch: int, stream: int | tuple[int, int], shape: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    """Numbers in [0, 1) that depend on (seed, epoch, stream, position) alone: the first rows do not on their count.

    stream: what the numbers are for, or (what for, which example).

    Raw Philox words, because NumPy promises their sequence for all its versions and that of `Generator` for none.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch, *np.atleast_1d(stream).tolist()))).random_raw(
        int(np.prod(shape))
    )
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)


def resized_size(
    size: Int32[np.ndarray, "*n 2"], short_side: Int32[np.ndarray, "*n"] | int, max_size: int | None
) -> Int32[np.ndarray, "*n 2"]:
    """DETR's resize rule: the short side becomes `short_side`, or less where the long one would exceed `max_size`.

    That lesser short side is rounded half to even, the long side is truncated; so the long side can pass max_size by
    a pixel or, in very long images, by half its ratio to the short one. A side never becomes 0, which DETR's can.
    """
    size = np.asarray(size)
    low, high = size.min(-1).astype(np.float64), size.max(-1).astype(np.float64)
    short = np.broadcast_to(np.asarray(short_side, np.float64), low.shape)
    if max_size is not None:
        short = np.where(high / low * short > max_size, np.rint(max_size * low / high), short)
    long = np.where(short >= 1, np.trunc(short * high / low), max_size or 0)
    short = np.maximum(short, 1)
    portrait = size[..., 0] > size[..., 1]
    return np.stack([np.where(portrait, long, short), np.where(portrait, short, long)], -1).astype(np.int32)


def training_geometry(sizes: Int32[np.ndarray, "N 2"], seed: int, epoch: int, config: ConfigDict) -> Geometry:
    """Draws one epoch's geometry; `config` is config.data. A side shorter than crop_min is not cropped."""
    sizes = np.asarray(sizes, np.int32)
    draw = uniform(seed, epoch, GEOMETRY, (len(sizes), 8))
    flip = draw[:, 0] < config.flip_probability
    cropped = draw[:, 1] < config.crop_probability
    scale = np.asarray(config.scales)[np.int32(draw[:, 2] * len(config.scales))]

    resized, corner, extent = sizes.copy(), np.zeros_like(sizes), sizes.copy()
    if cropped.any():
        crop_scale = np.asarray(config.crop_scales)[np.int32(draw[cropped, 3] * len(config.crop_scales))]
        side = resized_size(sizes[cropped], crop_scale, None)
        low, high = np.minimum(config.crop_min, side), np.minimum(config.crop_max, side)
        resized[cropped] = side
        extent[cropped] = low + np.int32(draw[cropped, 4:6] * (high - low + 1))
        corner[cropped] = np.int32(draw[cropped, 6:8] * (side - extent[cropped] + 1))
    return Geometry(sizes, flip, cropped, resized, corner, extent, resized_size(extent, scale, config.max_size))


def evaluation_geometry(sizes: Int32[np.ndarray, "N 2"], config: ConfigDict) -> Geometry:
    """The whole image, its short side eval_scale and its long side at most eval_max_size; never flipped."""
    sizes = np.asarray(sizes, np.int32)
    no = np.zeros(len(sizes), bool)
    size = resized_size(sizes, config.eval_scale, config.eval_max_size)
    return Geometry(sizes, no, no, sizes, np.zeros_like(sizes), sizes, size)


def check_augmentation(config: ConfigDict) -> None:
    """Raises UserError for fields of config.data from which no image could be drawn."""
    if len(config.scales) == 0 or (config.crop_probability > 0 and len(config.crop_scales) == 0):
        raise UserError("config.data.scales and config.data.crop_scales need at least one short side each.")
    for name in ("scales", "crop_scales", "max_size", "crop_min", "crop_max", "eval_scale", "eval_max_size"):
        for side in np.atleast_1d(config[name]).tolist():
            check_between(f"config.data.{name}", side, 1, LARGEST_SIDE)
    if config.crop_min > config.crop_max:
        raise UserError(f"config.data.crop_min is {config.crop_min}, more than crop_max, {config.crop_max}.")
    for name in ("flip_probability", "crop_probability"):
        check_between(f"config.data.{name}", config[name], 0, 1)
    check_at_least("config.data.num_workers", config.num_workers, 0)
    check_at_least("config.data.eval_buckets", config.eval_buckets, 1)


def transform_boxes(
    boxes: Float32[np.ndarray, "K 4"], geometry: Geometry, example: int
) -> tuple[Float32[np.ndarray, "J 4"], Bool[np.ndarray, " K"]]:
    """Takes one image's boxes along: xyxy pixels of the stored image -> cxcywh in [0, 1] of the output.

    Returns the boxes that are left and which of the K they are: a crop drops a box only when nothing of it remains;
    any sliver stays. float32 throughout and in DETR's order of operations, so values equal its own.
    """
    original, resized, extent, size = (
        getattr(geometry, name)[example] for name in ("original", "resized", "extent", "size")
    )
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    if geometry.flip[example]:
        width = np.float32(original[1])
        mirror = np.array([-1, 1, -1, 1], np.float32)
        boxes = boxes[:, [2, 1, 0, 3]] * mirror + np.array([width, 0, width, 0], np.float32)
    kept = np.ones(len(boxes), bool)
    if geometry.cropped[example]:
        boxes = boxes * _xyxy(resized / original) - _xyxy(geometry.corner[example])
        boxes = np.clip(boxes, np.float32(0), _xyxy(extent))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        boxes = boxes[kept]
    boxes = boxes * _xyxy(size / extent)
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / np.float32(2), high - low], axis=1) / _xyxy(size), kept


def _xyxy(pair):
    """(y, x) -> float32 (x, y, x, y), the order of box coordinates."""
    return np.float32([pair[1], pair[0], pair[1], pair[0]])

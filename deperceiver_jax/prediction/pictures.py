"""What a picture may be, and how it becomes one of a few padded sizes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict
from PIL import Image

from deperceiver_jax.data.batches.bit_depth import to_8_bits
from deperceiver_jax.data.batches.geometry import Geometry, evaluation_geometry
from deperceiver_jax.data.batches.pixels import decode_image, place_image, turn_upright
from deperceiver_jax.data.batches.plan import GRID
from deperceiver_jax.data.batches.views import Views, plan_views
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size, opened_orientation
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, reason

# bytes are an image file's; arrays are RGB, or grey without the last axis
Picture = str | Path | bytes | Image.Image | UInt8[np.ndarray, "h w 3"]


class Prepared(NamedTuple):
    """A picture in its padded frame."""

    frame: UInt8[np.ndarray, "H W 3"]  # zeros on padding
    size: Int32[np.ndarray, "2"]  # (height, width) of the real pixels at the frame's top left
    original_size: Int32[np.ndarray, "2"]  # (height, width) of the upright picture


def padded_sizes(config: ConfigDict, scales: Sequence[int] = ()) -> Int32[np.ndarray, "N 2"]:
    """The padded sizes (height, width) that every picture gets one of; at most five. `config` is config.data.

    The short side is eval_scale; the long side is as long, 4/3 as long, or eval_max_size; upright and lying. They do
    not depend on the pictures, so what is compiled once serves all of them. There are as many for each of `scales`,
    config.eval.scales.
    """
    padded = set()
    for scale in (config.eval_scale, *scales):
        short = min(scale, config.eval_max_size)
        longs = {short, min(-(-4 * short // 3), config.eval_max_size), config.eval_max_size}
        padded |= {tuple(-(-side // GRID) * GRID for side in (short, long)) for long in longs}
    sizes = padded | {size[::-1] for size in padded}
    return np.array(sorted(sizes, key=lambda size: (size[0] * size[1], size)), np.int32)


def prepare(pixels: UInt8[np.ndarray, "h w 3"], config: ConfigDict, sizes: Int32[np.ndarray, "N 2"]) -> Prepared:
    """Scales an upright picture as evaluation does, and lays it into the smallest of `sizes` that holds it.

    A long side that evaluation would let pass eval_max_size, as it may in strips, ends at the largest frame's.
    """
    return _prepare(pixels, evaluation_geometry(np.array([pixels.shape[:2]], np.int32), config), 0, sizes)


def prepare_views(
    pixels: UInt8[np.ndarray, "h w 3"], data: ConfigDict, config: ConfigDict, sizes: Int32[np.ndarray, "N 2"]
) -> tuple[Views, Iterator[Prepared]]:
    """The views of an upright picture that config.eval, `config`, asks for, each as `prepare` does it, one by one."""
    views = plan_views(np.array([pixels.shape[:2]], np.int32), data, config)
    return views, (_prepare(pixels, views.geometry, view, sizes) for view in range(len(views.example)))


def _prepare(pixels: np.ndarray, geometry: Geometry, view: int, sizes: np.ndarray) -> Prepared:
    size = geometry.size[view]
    holding = sizes[(sizes >= size).all(1)]
    padded = holding[0] if len(holding) else max(sizes, key=lambda padded: np.minimum(padded, size).prod())
    size = np.minimum(size, padded)
    frame = np.empty((*padded.tolist(), 3), np.uint8)
    place_image(frame, pixels, bool(geometry.flip[view]), geometry.window()[view], size)
    return Prepared(frame, size, geometry.original[view])


def read_pixels(picture: object) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a picture as a viewer shows it, turned by its EXIF orientation. Raises UserError."""
    if isinstance(picture, str | os.PathLike):
        return _read_file(as_path(os.fspath(picture)))
    if isinstance(picture, bytes):
        return _decode(picture, "The picture")
    if isinstance(picture, Image.Image):
        return _read_image(picture)
    if isinstance(picture, np.ndarray):
        return _read_array(picture)
    raise UserError(
        f"A picture is a path, the bytes of a file, a PIL image or a uint8 array, not {type(picture).__name__}."
    )


def _read_file(path: Path) -> np.ndarray:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from error
    return _decode(data, str(path))


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        image_size(data)  # refuses what is cut short or a bomb, which a decoder might not
        return decode_image(data, exif_orientation(data))
    except CorruptImage as error:
        raise UserError(f"{name} is not a whole image: {error}.") from error


def _read_image(image: Image.Image) -> np.ndarray:
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            pixels = np.repeat(to_8_bits(np.asarray(image))[..., None], 3, axis=2)
        else:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", "") or "A PIL image"
        raise UserError(f"{name} is not a whole image: {error}.") from error
    if 0 in pixels.shape:
        raise UserError(f"A PIL image has no pixels: it is {image.width} x {image.height}.")
    return turn_upright(pixels, opened_orientation(image))


def _read_array(array: np.ndarray) -> np.ndarray:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise UserError(
            f"A picture's array is uint8, [height, width, 3] in RGB or [height, width] in grey, not {array.dtype} "
            f"{list(array.shape)}."
        )
    return np.repeat(array[..., None], 3, axis=2) if grey else np.ascontiguousarray(array)

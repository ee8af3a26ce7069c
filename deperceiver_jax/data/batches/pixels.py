"""Encoded image -> uint8 pixels in a padded frame: one decode, one flip, one crop-and-resize.

The reference is what DETR does with Pillow: decode, `convert("RGB")`, bilinear resizes with antialiasing. Enlarging is
OpenCV's bilinear resize, which equals Pillow's to 1 grey level; shrinking is Pillow's own resize, because OpenCV has no
triangle filter. Where DETR crops between two resizes, one resize of the window in the stored image takes their place:
it keeps the detail that the first of the two blurs away. tests/data/test_pixels.py holds how far results may differ.
"""

import io
import math
import struct
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float64, Int32, UInt8
from PIL import Image, UnidentifiedImageError

from deperceiver_jax.data.batches.bit_depth import deep_pixels, to_8_bits, unknown_to_pillow
from deperceiver_jax.data.image_header import CorruptImage

cv2.setNumThreads(1)  # images are loaded side by side; threads inside one would only get in each other's way

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
_UNREADABLE += (RuntimeError,)  # Pillow's for AVIF


def decode_image(data: bytes, orientation: int = 1) -> UInt8[np.ndarray, "h w 3"]:
    """Any image that Pillow reads -> RGB, as its convert("RGB") gives it, turned by an EXIF orientation of 1 to 8.

    Pictures of more than 8 bits are brought to 8 as bit_depth.py says. JPEGs of three colours or grey take a faster way
    to the same pixels. Raises CorruptImage.
    """
    return turn_upright(_decode(data), orientation)


def turn_upright(image: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "..."]:
    """Stored pixels as a viewer shows them, by an EXIF orientation of 1 to 8."""
    if orientation >= 5:
        image = cv2.transpose(image)
    if orientation in (2, 3, 6, 7):
        image = cv2.flip(image, 1)  # left to right
    if orientation in (3, 4, 7, 8):
        image = cv2.flip(image, 0)  # top to bottom
    return image


def _decode(data):
    if data.startswith(b"\xff\xd8"):
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # damage; Pillow knows which damage can be overlooked
    try:
        with Image.open(io.BytesIO(data)) as image:
            deep = deep_pixels(data, image)
            if deep is None:
                return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        deep = unknown_to_pillow(data)
        if deep is None:
            raise CorruptImage(f"it cannot be decoded ({error})") from error
    except _UNREADABLE as error:
        raise CorruptImage(f"it cannot be decoded ({error})") from error
    levels = to_8_bits(deep)
    return np.ascontiguousarray(levels) if levels.ndim == 3 else cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB)


def place_image(
    frame: UInt8[np.ndarray, "H W 3"],
    image: UInt8[np.ndarray, "h w 3"],
    flip: bool,
    window: Float64[np.ndarray, "4"],
    size: Int32[np.ndarray, "2"],
) -> None:
    """Fills a padded frame: one output of `size` at its top left, zeros in the rest.

    window: (top, left, bottom, right) of the output in pixels of the image after the flip, see geometry.py.
    """
    height, width = (int(side) for side in size)
    frame[height:], frame[:height, width:] = 0, 0
    place_window(frame[:height, :width], *_cut(image, flip, window, (height, width)))


def _cut(
    image: UInt8[np.ndarray, "h w 3"],
    flip: bool,
    window: Sequence[float] | Float64[np.ndarray, "4"],
    size: tuple[int, int],
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[float, float, float, float]]:
    """(what an output of this size needs of the image after the flip, its window there): no more is touched."""
    top, left, bottom, right = (float(edge) for edge in window)
    reach = 2 + int(max((bottom - top) / size[0], (right - left) / size[1]))  # of a resize's filter
    rows = slice(max(int(top) - reach, 0), min(math.ceil(bottom) + reach, image.shape[0]))
    columns = slice(max(int(left) - reach, 0), min(math.ceil(right) + reach, image.shape[1]))
    if flip:
        width = image.shape[1]
        cut = cv2.flip(image[rows, width - columns.stop : width - columns.start], 1)
    else:
        cut = image[rows, columns]
    return cut, (top - rows.start, left - columns.start, bottom - rows.start, right - columns.start)


def place_window(
    output: UInt8[np.ndarray, "H W 3"],
    image: UInt8[np.ndarray, "h w 3"],
    window: Sequence[float] | Float64[np.ndarray, "4"],
) -> None:
    """Fills `output` with a window, (top, left, bottom, right) in pixels, of the image."""
    height, width = output.shape[:2]
    top, left, bottom, right = (float(edge) for edge in window)
    step_y, step_x = (bottom - top) / height, (right - left) / width  # stored pixels per output pixel
    if max(step_y, step_x) > 1:
        box = (left, top, min(right, image.shape[1]), min(bottom, image.shape[0]))
        output[:] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box)
    elif (bottom - top, right - left) == image.shape[:2]:
        cv2.resize(image, (width, height), dst=output, interpolation=cv2.INTER_LINEAR)
    else:  # output pixel i lies at i + 1/2 of its grid, and at (i + 1/2) * step + start of the image's
        to_image = np.array([[step_x, 0, step_x / 2 - 0.5 + left], [0, step_y, step_y / 2 - 0.5 + top]])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(image, to_image, (width, height), output, how, cv2.BORDER_REPLICATE)


def paste_window(
    output: UInt8[np.ndarray, "H W 3"],
    image: UInt8[np.ndarray, "h w 3"],
    flip: bool,
    window: Sequence[float],
    fade: int,
) -> None:
    """Lays a window of the image after the flip over `output`, into which it fades at its border over `fade` pixels."""
    patch = np.empty_like(output)
    place_window(patch, *_cut(image, flip, window, output.shape[:2]))
    down, across = (np.minimum(np.arange(side) + 0.5, side - 0.5 - np.arange(side)) for side in output.shape[:2])
    share = (np.minimum(down / fade, 1)[:, None] * np.minimum(across / fade, 1)).astype(np.float32)[..., None]
    output[:] = np.rint(output + share * (patch - output.astype(np.float32)))

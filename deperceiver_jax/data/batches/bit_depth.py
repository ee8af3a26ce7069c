"""Pictures of more than 8 bits a channel, of whole numbers or floats, brought to the 8 bits that a detector sees."""

import cv2
import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

DEPTHS = (8, 10, 12, 16)  # bits that a camera's or a scanner's numbers have, whatever the file could hold
_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # tags of TIFF


def deep_pixels(data: bytes, image: Image.Image) -> Num[np.ndarray, "h w *channels"] | None:
    """The pixels of a picture that has more than 8 bits a channel, else None. `image` is what Pillow opened of `data`.

    Colours are read by OpenCV, since Pillow keeps the upper 8 of 16 bits alone, whatever lies in them.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    deep = data[24] > 8 if image.format == "PNG" else max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 8))) > 8
    if not deep or tags.get(_ORIENTATION, 1) != 1:  # which Pillow applies to a TIFF
        return None
    return _read_by_opencv(data)


def unknown_to_pillow(data: bytes) -> Num[np.ndarray, "h w *channels"] | None:
    """The pixels of a TIFF of a kind that Pillow lacks, as colours in floats; None where OpenCV lacks it, too."""
    return _read_by_opencv(data) if data[:4] in (b"II*\0", b"MM\0*") else None


def _read_by_opencv(data):
    """RGB, or grey; a fourth channel, transparency, is left out. None for other channels and for what OpenCV lacks."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # a kind that OpenCV was not built for, or a size beyond its limit
        return None
    if pixels is None or pixels.ndim == 2:
        return pixels
    return pixels[..., 2::-1] if pixels.shape[2] in (3, 4) else None


def to_8_bits(pixels: Num[np.ndarray, "*axes"]) -> UInt8[np.ndarray, "*axes"]:
    """Grey levels 0 to 255 by the range of the picture's own values; levels that 8 bits can hold stay apart.

    Whole numbers below 65536 are taken to have the fewest of DEPTHS bits that hold the largest of them, and keep their
    upper 8: numbers below 256 are grey levels already, below 1024 of 10 bits, below 4096 of 12 bits. Floats from 0 to 1
    are shares of white. Anything else (negative numbers, metres, 32 bits) goes linearly from its least value, black,
    to its greatest, white. What is not finite counts as the least value.
    """
    if pixels.dtype.kind == "f":
        finite = np.isfinite(pixels)
        pixels = np.where(finite, pixels, pixels.min(where=finite, initial=np.inf))
        if not finite.any():
            return np.zeros(pixels.shape, np.uint8)
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(pixels * 255).astype(np.uint8)
    if low >= 0 and high < 2 ** DEPTHS[-1] and (pixels == np.rint(pixels)).all():
        depth = next(bits for bits in DEPTHS if high < 2**bits)
        return (pixels.astype(np.uint16) >> (depth - 8)).astype(np.uint8)
    share = (pixels.astype(np.float64) - low) / max(float(high) - float(low), np.finfo(np.float64).tiny)
    return np.rint(255 * share).astype(np.uint8)

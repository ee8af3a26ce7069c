"""The size and orientation of an encoded image, and whether its file is whole, without decoding a pixel."""

import io
import mmap
import struct
from collections.abc import Iterator
from typing import IO, cast

import numpy as np
import simplejpeg
from jaxtyping import Bool, Int
from PIL import Image, UnidentifiedImageError

_JPEG_START, _JPEG_END, _START_OF_SCAN, _APP1 = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xE1
_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112  # TIFF's tags, of which EXIF has the last
_LONG = 4  # the kind of a number of 32 bits; others have 16
_TIFF_STARTS = b"II*\0", b"MM\0*"
_PNG_START = b"\x89PNG\r\n\x1a\n"
PICTURE_ENDINGS = tuple(".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())  # of data sets
MOST_PIXELS = 178_956_970  # Pillow's own bound between a large picture and a bomb


Encoded = bytes | mmap.mmap  # a file, read or mapped; what is mapped is read where it is looked at


class CorruptImage(ValueError):
    """The bytes are not a whole image; the message says what is wrong with them."""


def is_swapped(orientation: Int[np.ndarray, "*n"] | int) -> Bool[np.ndarray, "*n"]:
    """Whether an EXIF orientation, 1 to 8, exchanges height and width."""
    return np.asarray(orientation) >= 5


def exif_orientation(image: Encoded) -> int:
    """How a viewer turns the stored pixels of a whole image: 1 (as they are) to 8, as EXIF's tag says; 1 without one.

    A TIFF has none, since Pillow turns it while decoding. Raises CorruptImage for what is no image.
    """
    if image[: len(_JPEG_START)] == _JPEG_START:
        payloads = (image[start:end] for marker, start, end in _jpeg_segments(image) if marker == _APP1)
        return next((_tiff_orientation(data[6:]) for data in payloads if data.startswith(b"Exif\0\0")), 1)
    if image[: len(_PNG_START)] == _PNG_START:
        return next(
            (_tiff_orientation(image[start:end]) for kind, start, end in _png_chunks(image) if kind == b"eXIf"), 1
        )
    if _unknown_tiff_size(image):
        return 1
    with _open(image) as opened:
        return opened_orientation(opened)


def opened_orientation(image: Image.Image) -> int:
    """exif_orientation of a picture that Pillow has opened."""
    exif = image.info.get("exif", b"")
    return 1 if image.format == "TIFF" else _tiff_orientation(exif.removeprefix(b"Exif\0\0"))


def image_size(image: Encoded) -> tuple[int, int]:
    """(height, width) of the stored pixels; see exif_orientation for how they are turned.

    A JPEG or PNG must also have its end marker, which a truncated file lacks; what follows it does not matter. Raises
    CorruptImage, also for a picture of so many pixels that Pillow takes it for a bomb.
    """
    if not image:
        raise CorruptImage("it is empty")
    if image[: len(_JPEG_START)] == _JPEG_START:
        if image.rfind(_JPEG_END, _first_scan(image)) < 0:
            raise CorruptImage("it is a truncated JPEG")
        try:
            height, width = simplejpeg.decode_jpeg_header(image)[:2]
        except ValueError as error:
            raise CorruptImage(f"its JPEG header cannot be read ({error})") from error
        if height * width > MOST_PIXELS:
            raise CorruptImage(f"its {width} x {height} pixels are more than the {MOST_PIXELS} that are decoded")
        return height, width
    if image[: len(_PNG_START)] == _PNG_START and all(kind != b"IEND" for kind, _, _ in _png_chunks(image)):
        raise CorruptImage("it is a truncated PNG")
    if size := _unknown_tiff_size(image):
        return size
    with _open(image) as opened:
        return opened.height, opened.width


def _unknown_tiff_size(image: Encoded) -> tuple[int, int] | None:
    """(height, width) of a TIFF of a kind that Pillow lacks, as colours in floats, and OpenCV has; None for others."""
    if image[:4] not in _TIFF_STARTS:
        return None
    try:
        with _open(image):
            return None
    except CorruptImage:
        tags = _tiff_tags(image[:])
    if not tags.get(_WIDTH) or not tags.get(_HEIGHT) or tags.get(_ORIENTATION, 1) != 1:
        return None
    if tags[_WIDTH] * tags[_HEIGHT] > MOST_PIXELS:
        return None
    return tags[_HEIGHT], tags[_WIDTH]


def _open(image: Encoded) -> Image.Image:
    mapped = isinstance(image, mmap.mmap) and image[:4] not in _TIFF_STARTS  # a TIFF's file Pillow closes
    try:
        return Image.open(cast(IO[bytes], image) if mapped else io.BytesIO(image[:]))
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"its pixels are more than the {MOST_PIXELS} that are decoded") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise CorruptImage("it is not an image that Pillow knows") from error


def _first_scan(image: Encoded) -> int:
    """Where a JPEG's pixels begin. Segments before it may hold a thumbnail with an end marker of its own."""
    *_, (_, position, _) = _jpeg_segments(image)
    return position


def _jpeg_segments(image: Encoded) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of what each segment holds, up to and with the start of a scan. Raises CorruptImage."""
    position = 2
    while position + 4 <= len(image):
        if image[position] != 0xFF:
            raise CorruptImage("its JPEG header is broken")
        marker = image[position + 1]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
            continue
        end = position + 2 + int.from_bytes(image[position + 2 : position + 4])
        yield marker, position + 4, end
        if marker == _START_OF_SCAN:
            return
        position = end
    raise CorruptImage("it is a truncated JPEG")


def _png_chunks(image: Encoded) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of what each chunk holds, as far as the file goes."""
    position = len(_PNG_START)
    while position + 12 <= len(image):
        start = position + 8
        end = start + int.from_bytes(image[position : position + 4])
        yield image[position + 4 : start], start, end
        position = end + 4  # its check sum


def _tiff_orientation(exif: bytes) -> int:
    """The orientation in a block of EXIF, which is a TIFF without pixels; 1 where it has none or is broken."""
    value = _tiff_tags(exif).get(_ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def _tiff_tags(block: bytes) -> dict[int, int]:
    """{tag: number} of a TIFF's first directory, for those of one number and this file's use; as far as it is whole."""
    order, tags = {b"II": "<", b"MM": ">"}.get(block[:2]), dict[int, int]()
    if order is None:
        return tags
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, directory)
        for entry in range(count):
            place = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", block, place)
            if tag in (_WIDTH, _HEIGHT, _ORIENTATION):
                (tags[tag],) = struct.unpack_from(order + ("I" if kind == _LONG else "H"), block, place + 8)
    except struct.error:  # it ends too early, and no viewer makes anything of it either
        pass
    return tags

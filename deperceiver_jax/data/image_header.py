"""The size of an encoded image, and whether its file is whole, without decoding a pixel."""

import io

import simplejpeg
from PIL import Image, UnidentifiedImageError

_JPEG_START, _JPEG_END, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class CorruptImage(ValueError):
    """The bytes are not a whole image; the message says what is wrong with them."""


def image_size(image: bytes) -> tuple[int, int]:
    """(height, width) of the stored pixels; an orientation in EXIF is ignored, as Pillow's open does.

    A JPEG or PNG must also have its end marker, which a truncated file lacks. Raises CorruptImage.
    """
    if not image:
        raise CorruptImage("it is empty")
    if image.startswith(_JPEG_START):
        if image.find(_JPEG_END, _first_scan(image)) < 0:
            raise CorruptImage("it is a truncated JPEG")
        try:
            return simplejpeg.decode_jpeg_header(image)[:2]
        except ValueError as error:
            raise CorruptImage(f"its JPEG header cannot be read ({error})") from error
    if image.startswith(_PNG_START) and _PNG_END not in image[-64:]:
        raise CorruptImage("it is a truncated PNG")
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.height, opened.width
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise CorruptImage("it is not an image that Pillow knows") from error


def _first_scan(image: bytes) -> int:
    """Where a JPEG's pixels begin. Segments before it may hold a thumbnail with an end marker of its own."""
    position = 2
    while position + 4 <= len(image):
        if image[position] != 0xFF:
            raise CorruptImage("its JPEG header is broken")
        marker = image[position + 1]
        if marker == _START_OF_SCAN:
            return position
        padded = marker == 0xFF  # fill bytes may stand before a marker
        position += 1 if padded else 2 + int.from_bytes(image[position + 2 : position + 4])
    raise CorruptImage("it is a truncated JPEG")

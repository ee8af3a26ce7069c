import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size


def _encoded(mode, format, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


KINDS = [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "BMP")]
BROKEN = [b"", b"not an image", b"\xff\xd8", b"\xff\xd8\xff\xff\xff", b"\xff\xd8" + bytes(99)]


@pytest.mark.parametrize(("mode", "format"), KINDS)
def test_size_of_every_kind_of_image(mode, format):
    assert image_size(_encoded(mode, format)) == (20, 30)


@pytest.mark.parametrize("rest", [b"\0" * 100, b"IEND", b"\x89PNG\r\n\x1a\n", bytes(10**5)])
def test_bytes_after_the_end_of_a_png_do_not_matter(rest):
    whole = _encoded("RGB", "PNG")
    assert image_size(whole + rest) == (20, 30)
    with pytest.raises(CorruptImage, match="truncated PNG"):
        image_size(whole[:-13] + rest)


def test_bombs_are_corrupt():
    """Headers alone: of more pixels than anybody means, which decoding would ask gigabytes for."""
    header = struct.pack(">II", 20000, 20000) + b"\x08\x02\0\0\0"
    png = _encoded("RGB", "PNG")
    start = png.index(b"IHDR") + 4
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    jpeg = _encoded("RGB", "JPEG", progressive=False)
    frame = jpeg.index(b"\xff\xc0") + 5
    for bomb in (png[:start] + header + check + png[start + 17 :], jpeg[:frame] + b"\xfd\xe8" * 2 + jpeg[frame + 4 :]):
        with pytest.raises(CorruptImage, match="pixels are more than the 178956970 that are decoded"):
            image_size(bomb)


def test_progressive_jpeg_and_trailing_bytes_are_whole():
    assert image_size(_encoded("RGB", "JPEG", progressive=True) + b"\0camera") == (20, 30)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", *["AVIF"] * features.check("avif")])
def test_orientation_is_read_and_leaves_the_stored_size(format):
    assert exif_orientation(_encoded("RGB", format)) == 1
    for orientation in range(1, 9):
        image = _encoded("RGB", format, exif=_exif(orientation))
        assert (image_size(image), exif_orientation(image)) == ((20, 30), orientation)


def test_a_tiff_is_turned_by_pillow():
    image = _encoded("RGB", "TIFF", exif=_exif(6))
    assert (image_size(image), exif_orientation(image)) == ((30, 20), 1)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",  # ends before its directory
        b"XX*\0\x08\0\0\0",  # of no byte order
        b"II*\0\xff\0\0\0",  # a directory beyond the end
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",  # orientation 9
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\0\0\0\0",  # orientation 0
    ],
)
def test_broken_exif_says_nothing(block):
    for format in ("JPEG", "PNG", "WEBP"):
        assert exif_orientation(_encoded("RGB", format, exif=b"Exif\0\0" + block)) == 1


def test_orientation_in_either_byte_order_and_as_a_long_number():
    for order, kind, size, value in (("<", "I", 4, 8), (">", "I", 4, 7), (">", "H", 3, 6)):
        start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
        entry = struct.pack(order + "HHHI" + kind, 1, 0x0112, size, 1, value)
        block = start + entry.ljust(14, b"\0")
        assert exif_orientation(_encoded("RGB", "JPEG", exif=b"Exif\0\0" + block)) == value


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_truncated_images_are_corrupt(format, share):
    whole = _encoded("RGB", format)
    with pytest.raises(CorruptImage):
        image_size(whole[: max(3, int(share * len(whole)))])


def test_the_end_of_a_thumbnail_is_not_the_end_of_its_image():
    exif = Image.Exif().tobytes() + _encoded("RGB", "JPEG")
    whole = _encoded("RGB", "JPEG", exif=exif)
    assert image_size(whole) == (20, 30)
    with pytest.raises(CorruptImage, match="truncated JPEG"):
        image_size(whole[:-20])


@pytest.mark.parametrize("content", BROKEN)
def test_what_is_no_image_is_corrupt(content):
    with pytest.raises(CorruptImage):
        image_size(content)

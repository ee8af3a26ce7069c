import io

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data.image_header import CorruptImage, image_size


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


def test_progressive_jpeg_and_trailing_bytes_are_whole():
    assert image_size(_encoded("RGB", "JPEG", progressive=True) + b"\0camera") == (20, 30)


def test_orientation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert image_size(_encoded("RGB", "JPEG", exif=exif)) == (20, 30)


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

"""Pictures of more than 8 bits: scaled by what is in them, and no level lost that 8 bits can hold."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from deperceiver_jax.data.batches.bit_depth import to_8_bits
from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.data.image_header import exif_orientation, image_size

LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16)  # every one of 8 bits


def encoded(pixels, ending=".png"):
    return cv2.imencode(ending, pixels)[1].tobytes()


def pillow_tiff(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    return file.getvalue()


def colours(levels):
    """Three channels that differ, in OpenCV's order, blue first."""
    return np.stack([levels, levels.T, levels[::-1]], -1)


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(lambda levels: levels * 257, id="16 bits, as most programs spread them"),
        pytest.param(lambda levels: levels << 8, id="16 bits, shifted"),
        pytest.param(lambda levels: levels << 4, id="12 bits"),
        pytest.param(lambda levels: levels << 2, id="10 bits"),
        pytest.param(lambda levels: levels, id="8 bits"),
    ],
)
def test_8_bits_in_a_deeper_file_come_back_as_they_were(spread, ending):
    deep = spread(LEVELS)
    np.testing.assert_array_equal(decode_image(encoded(deep, ending)), np.repeat(LEVELS[..., None], 3, -1))
    expected = colours(LEVELS)[..., ::-1]
    for channels in (3, 4):  # without and with alpha, which is dropped as from any other picture
        opaque = np.full((16, 16, 4), spread(np.uint16(255)), np.uint16)
        opaque[..., :3] = colours(deep)
        found = decode_image(encoded(np.ascontiguousarray(opaque[..., :channels]), ending))
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


def test_true_depth_is_told_by_the_largest_value():
    for largest, level in [(255, 255), (256, 64), (1023, 255), (1024, 64), (4095, 255), (4096, 16), (65535, 255)]:
        assert to_8_bits(np.array([0, largest], np.uint16)).tolist() == [0, level]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_whole_numbers_of_other_kinds_are_as_those_of_16_bits(dtype):
    for spread in (1, 4, 16, 257):
        pixels = (LEVELS * spread).astype(dtype)
        np.testing.assert_array_equal(decode_image(pillow_tiff(pixels))[..., 1], LEVELS)


def test_other_ranges_are_spread_from_black_to_white():
    shares = np.float32(LEVELS) / 255
    for pixels in (
        shares,
        shares * 80 - 40,
        shares * 8848.5 + 0.25,
        np.int32(LEVELS) * 10**6 - 3,
        np.int32(LEVELS) - 100,
    ):
        np.testing.assert_array_equal(decode_image(pillow_tiff(pixels))[..., 0], LEVELS)
    half = decode_image(pillow_tiff(shares / 2))  # shares of white, of which the brightest is grey
    assert half.max() == 128


def test_odd_pictures():
    nan, inf = np.nan, np.inf
    assert to_8_bits(np.float32([nan, 0.5, inf, 1.0, -inf])).tolist() == [128, 128, 128, 255, 128]
    assert to_8_bits(np.float32([nan, inf])).tolist() == [0, 0]
    assert to_8_bits(np.float32([-7.5, -7.5])).tolist() == [0, 0]
    assert to_8_bits(np.uint16([300, 300])).tolist() == [75, 75]  # flat, of 10 bits
    limits = np.iinfo(np.int32)
    assert to_8_bits(np.int32([limits.min, 0, limits.max])).tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_in_floats_which_pillow_does_not_know(dtype, channels):
    shares = np.random.default_rng(0).random((5, 7, channels)).astype(dtype)
    data = encoded(shares, ".tiff")
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    assert (image_size(data), exif_orientation(data)) == ((5, 7), 1)
    found = decode_image(data)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.rint(255 * shares[..., 2::-1]).astype(np.uint8))


def test_a_turned_tiff_of_16_bits():
    """Pillow turns it, so its size is the turned one's; such a rare file is read by Pillow alone."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(LEVELS[:8] * np.uint16(257)).save(file, "TIFF", exif=exif)
    np.testing.assert_array_equal(decode_image(file.getvalue())[..., 0], np.rot90(LEVELS[:8], -1))

"""Which sizes of images are tried before the first step. What detectors say against them: their own tests."""

import jax
import jax.numpy as jnp
import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.training.check_sizes import check_sizes, extreme_sizes


def test_smallest_and_largest():
    """Landscape and portrait at both ends; those between are neither."""
    small, large = [(64, 96), (96, 64)], [(160, 192), (192, 160)]
    assert extreme_sizes([*large, (128, 128), (96, 96), *small, (64, 96)]) == sorted([*small, *large])
    assert extreme_sizes([(64, 64)]) == [(64, 64)]


def test_the_refused_size_is_named():
    def merge(arrays):
        def detector(image, pixel_valid):
            assert image.shape == (2, *pixel_valid.shape[1:], 3) and pixel_valid.dtype == bool
            if image.shape[1] > arrays["limit"].shape[0]:
                raise UserError("It is too high.")
            return jnp.zeros(3)

        return detector

    mesh = make_mesh(devices=jax.devices()[:2])  # an image for each
    arrays = {"limit": jnp.zeros(100)}
    check_sizes(merge, arrays, [(64, 64), (100, 320)], mesh)
    with pytest.raises(
        UserError, match="^Images of 128 x 32 pixels, padding included, will come, but: It is too high.$"
    ):
        check_sizes(merge, arrays, [(64, 64), (128, 32)], mesh)

"""Masks and sizes of feature maps, by hand."""

import jax
import numpy as np

from deperceiver_jax.models.features.tokens import (
    cell_places,
    feature_valid,
    image_size,
    size_in_cells,
    size_in_whole_cells,
)


def test_feature_valid_takes_the_floor_not_the_half_pixel():
    pixel_valid = np.zeros((1, 7, 9), bool)
    pixel_valid[:, :5, :4] = True
    # Rows look at pixels floor(i * 7/4) = 0, 1, 3, 5; columns at floor(i * 9/3) = 0, 3, 6.
    expected = np.outer([1, 1, 1, 0], [1, 1, 0]).astype(bool)
    np.testing.assert_array_equal(feature_valid(pixel_valid, 4, 3)[0], expected)


def test_sizes_of_images():
    """A whole image of 64 x 80 pixels, and one of 50 x 70 with padding."""
    valid = np.ones((2, 64, 80), bool)
    valid[1, 50:] = valid[1, :, 70:] = False

    @jax.jit
    def sizes(valid):
        maps = [feature_valid(valid, 4, 5), feature_valid(valid, 2, 3)]
        return image_size(valid), size_in_cells(valid, (16, 32)), size_in_whole_cells(maps)

    pixels, cells, whole_cells = jax.device_get(sizes(valid))
    np.testing.assert_array_equal(pixels, [[80, 64], [70, 50]])
    np.testing.assert_allclose(cells[1], [[70 / 16, 50 / 16], [70 / 32, 50 / 32]])
    np.testing.assert_array_equal(whole_cells, [[[5, 4], [3, 2]], [[5, 4], [3, 2]]])


def test_places_of_cells():
    """121 x 100 pixels are 15.125 x 12.5 cells of 8: the last of 16 rows lies beyond, and the others where they are."""
    places = jax.jit(cell_places, static_argnums=(0, 1))(16, 13, np.float32([[100 / 8, 121 / 8], [4, 2]]))
    places = np.asarray(places).reshape(2, 16, 13, 2)
    np.testing.assert_allclose(places[0, 3, 2], [2.5 * 8 / 100, 3.5 * 8 / 121], rtol=1e-6)
    np.testing.assert_allclose(places[0, 15, 12], [12.5 * 8 / 100, 15.5 * 8 / 121], rtol=1e-6)
    np.testing.assert_allclose(places[1, 1, 2], [2.5 / 4, 1.5 / 2])

import numpy as np
import pytest

from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.data.datasets.shapes.drawing import RECIPES, draw


@pytest.fixture(scope="module")
def pictures():
    return [draw(RECIPES["standard"], "train", index) for index in range(150)]


def _shares(pictures):
    return np.concatenate([p.areas / (p.image.shape[0] * p.image.shape[1]) for p in pictures])


def test_pictures_belong_to_their_version():
    """Whoever changes the drawing raises the version, by which prepared data sets are told apart, and these numbers."""
    picture = draw(RECIPES["standard"], "validation", 1)
    assert {name: recipe.version for name, recipe in RECIPES.items()} == {"standard": "1.0.0", "small": "2.0.0"}
    assert picture.image.shape == (126, 142, 3)
    assert picture.labels.tolist() == [3, 3, 2, 2, 0, 0]
    np.testing.assert_allclose(picture.boxes[2:4], [[69, 66, 26, 27], [77, 100, 13, 14]], atol=1)
    np.testing.assert_allclose(picture.image.mean(), 117.5, atol=0.5)


def test_a_picture_depends_on_its_split_and_index_alone():
    recipe = RECIPES["standard"]
    first, again = draw(recipe, "train", 5), draw(recipe, "train", 5)
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for other in (draw(recipe, "train", 6), draw(recipe, "validation", 5)):
        assert other.image.shape != first.image.shape or not np.array_equal(other.image, first.image)


def test_images_are_of_many_sizes_in_the_stated_range(pictures):
    recipe = RECIPES["standard"]
    heights, widths = np.array([p.image.shape[:2] for p in pictures]).T
    assert (heights.min() >= recipe.heights[0]) and (heights.max() <= recipe.heights[1])
    assert (widths.min() >= recipe.widths[0]) and (widths.max() <= recipe.widths[1])
    assert len(set(heights)) > 10 and len(set(widths)) > 10


def test_every_class_and_every_size_is_common(pictures):
    counts = np.bincount(np.concatenate([p.labels for p in pictures]), minlength=4)
    assert counts.min() > 0.15 * counts.sum()
    shares = _shares(pictures)
    groups = np.digitize(shares, [drawing.SMALL_SHARE, drawing.LARGE_SHARE])
    assert np.bincount(groups, minlength=3).min() > 0.15 * len(shares)


def test_boxes_enclose_visible_shapes_inside_the_image(pictures):
    for picture in pictures:
        height, width = picture.image.shape[:2]
        low, size = picture.boxes[:, :2], picture.boxes[:, 2:]
        assert (low >= 0).all() and (low + size <= (width, height)).all() and (size >= 1).all()
        assert (picture.areas <= size.prod(axis=1)).all()
        assert 0 < len(picture.boxes) <= RECIPES["standard"].objects[1]


def test_some_shapes_overlap(pictures):
    overlapping = 0
    for picture in pictures:
        low, high = picture.boxes[:, :2], picture.boxes[:, :2] + picture.boxes[:, 2:]
        sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        overlapping += ((sides > 0).all(axis=-1) & ~np.eye(len(low), dtype=bool)).any()
    assert overlapping > 0.2 * len(pictures)


def test_the_small_recipe_draws_many_small_shapes():
    pictures = [draw(RECIPES["small"], "train", index) for index in range(20)]
    assert np.mean([len(p.labels) for p in pictures]) > 5
    areas = np.concatenate([p.areas for p in pictures])
    assert np.mean(areas < 32**2 * drawing.AREA_SCALE) > 0.6  # what the metric calls small

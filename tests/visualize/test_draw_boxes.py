"""Drawn boxes: where they are, that labels stay inside, that nothing depends on the size of the image."""

import numpy as np
import pytest

from deperceiver_jax.visualize import draw_boxes as room
from deperceiver_jax.visualize.draw_boxes import READABLE_SIDE, class_color, draw_detections

NAMES = {0: "a rather long class name", 1: "cat", 5: "x"}.__getitem__


def gray(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def test_box_is_drawn_where_it_is():
    picture = draw_detections(gray(1000, 800), np.array([[100.0, 300, 500, 900]]), np.array([1]), None, NAMES)
    assert picture.shape == (1000, 800, 3) and picture.dtype == np.uint8
    color = np.array(class_color(1), np.uint8)
    rows, columns = np.nonzero((picture == color).all(-1))
    assert (columns.min(), columns.max(), rows.max()) == (100, 500, 900)
    np.testing.assert_array_equal(picture[600, 300], 128)  # only the outline
    np.testing.assert_array_equal(picture[600, 100], color)


def test_a_tiny_image_is_enlarged_before_drawing():
    picture = draw_detections(gray(96, 128), np.array([[32.0, 24, 64, 48]]), np.array([1]), np.array([0.5]), NAMES)
    assert picture.shape == (READABLE_SIDE * 96 // 128, READABLE_SIDE, 3)
    rows, columns = np.nonzero((picture == np.array(class_color(1), np.uint8)).all(-1))
    assert columns.min() == 128 and rows.max() == 192


@pytest.mark.parametrize("height, width", [(128, 128), (60, 900), (900, 60), (1, 1), (1333, 800)])
@pytest.mark.parametrize("corner", [(-0.5, -0.5), (0.9, 0.9), (-0.5, 0.9), (0.0, 0.0), (2.0, 2.0)])
def test_labels_stay_inside(height, width, corner, monkeypatch):
    """Every label's rectangle lies in the picture, for boxes at and beyond every border."""
    places, place = [], room._place
    monkeypatch.setattr(room, "_place", lambda *args: places.append(place(*args)) or places[-1])
    box = np.array([corner[0] * width, corner[1] * height, corner[0] * width + width, corner[1] * height + height])
    picture = draw_detections(gray(height, width), box[None].repeat(3, 0), np.array([0, 1, 5]), np.ones(3), NAMES)
    assert len(places) == 3
    for left, top, right, bottom in places:
        assert 0 <= left <= right < picture.shape[1] and 0 <= top <= bottom < picture.shape[0]


def test_labels_of_close_boxes_do_not_cover_one_another():
    boxes = np.array([[300.0, 300, 340, 340], [304, 302, 344, 342], [296, 304, 336, 344]])
    picture = draw_detections(gray(700, 700), boxes, np.array([0, 1, 5]), np.array([0.9, 0.8, 0.7]), NAMES)
    for label in (0, 1, 5):  # each background is seen, not only an outline of a few pixels
        assert (picture == np.array(class_color(label), np.uint8)).all(-1).sum() > 250


def test_colors_are_stable_and_apart():
    colors = [class_color(i) for i in range(91)]
    assert colors == [class_color(i) for i in range(91)] and len(set(colors)) == 91
    near = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors[:24]) for b in colors[:i]]
    assert min(near) > 40

"""Geometry: DETR's rounding rules and boxes exactly, and its distribution."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data.batches.geometry import (
    Geometry,
    check_augmentation,
    evaluation_geometry,
    resized_size,
    training_geometry,
    transform_boxes,
    uniform,
)
from deperceiver_jax.errors import UserError

OFFICIAL = json.loads((Path(__file__).parents[2] / "golden" / "detr_transforms.json").read_text())


def _config(**fields):
    config = base().data
    config.update(fields)
    return config


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 480, (800, 1066)),
        (640, 427, (800, 1199)),
        (640, 360, (750, 1333)),
        (500, 375, (800, 1066)),
        (333, 500, (1201, 800)),
        (640, 241, (502, 1333)),
        (200, 640, (1334, 417)),  # rounding lets the long side pass the limit
    ],
)
def test_resize_rule(width, height, expected):
    assert tuple(resized_size(np.array([height, width]), 800, 1333)) == expected


def test_resize_rule_of_many_sizes_equals_python_arithmetic():
    sizes = np.random.default_rng(0).integers(30, 1500, (3000, 2))
    for short, limit in [(800, 1333), (480, 1333), (400, None)]:
        found = resized_size(sizes, short, limit)
        for (height, width), size in zip(sizes.tolist(), found.tolist(), strict=True):
            low, high, side = min(height, width), max(height, width), short
            if limit is not None and high / low * side > limit:
                side = int(round(limit * low / high))
            long = int(side * high / low)
            assert size == ([long, side] if height > width else [side, long])


def test_sides_never_vanish():
    assert resized_size(np.array([[1, 3000], [5000, 1]]), 800, 1333).tolist() == [[1, 1333], [1333, 1]]


def test_official_evaluation_sizes():
    rows = np.array(OFFICIAL["evaluation_800_1333"])
    geometry = evaluation_geometry(rows[:, :2], _config())
    np.testing.assert_array_equal(geometry.size, rows[:, 2:])
    np.testing.assert_array_equal(geometry.window()[:, 2:], rows[:, :2])
    assert not geometry.flip.any()


@pytest.mark.parametrize("case", OFFICIAL["training"], ids=lambda case: "{original}{scale}".format(**case))
def test_official_training_transforms(case):
    """Sizes, surviving boxes and every bit of their coordinates."""
    if case["cropped"]:
        assert resized_size(np.array(case["original"]), case["crop_scale"], None).tolist() == case["resized"]
    assert resized_size(np.array(case["extent"]), case["scale"], 1333).tolist() == case["size"]
    arrays = [np.int32([case[name]]) for name in ("resized", "corner", "extent", "size")]
    flags = [np.array([case[name]]) for name in ("flip", "cropped")]
    boxes, kept = transform_boxes(np.float32(case["boxes"]), Geometry(np.int32([case["original"]]), *flags, *arrays), 0)
    assert np.flatnonzero(kept).tolist() == case["kept"]
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, np.float32(case["expected"]).reshape(-1, 4))


def test_drawn_distribution():
    config, count = _config(), 60_000
    geometry = training_geometry(np.tile(np.int32([480, 640]), (count, 1)), 3, 5, config)
    crop = geometry.take(geometry.cropped)
    assert abs(geometry.flip.mean() - 0.5) < 0.01 and abs(geometry.cropped.mean() - 0.5) < 0.01
    assert abs((geometry.flip & geometry.cropped).mean() - 0.25) < 0.01

    scales, counts = np.unique(geometry.size[~geometry.cropped].min(1), return_counts=True)
    assert scales.tolist() == list(config.scales)
    assert np.abs(counts * 11 / counts.sum() - 1).max() < 0.1
    first, counts = np.unique(crop.resized[:, 0], return_counts=True)
    assert first.tolist() == [400, 500, 600] and np.abs(counts * 3 / counts.sum() - 1).max() < 0.05

    for short in (400, 500, 600):
        chosen = crop.take(crop.resized[:, 0] == short)
        top = np.minimum(chosen.resized[0], 600)
        assert (chosen.extent.min(0) == 384).all() and (chosen.extent.max(0) == top).all()
        assert np.abs(chosen.extent.mean(0) - (384 + top) / 2).max() < 3
        room = chosen.resized - chosen.extent
        assert (chosen.corner >= 0).all() and (chosen.corner <= room).all()
        assert (chosen.corner == 0).any(0).all() and (chosen.corner == room).any(0).all()
        assert np.abs(chosen.corner.mean(0) - room.mean(0) / 2).max() < 3


def test_depends_on_seed_epoch_position_and_size_alone():
    sizes = np.random.default_rng(0).integers(300, 640, (50, 2)).astype(np.int32)
    config = _config()
    drawn = training_geometry(sizes, 1, 2, config)
    alone = training_geometry(sizes[:7], 1, 2, config)
    for name in ("flip", "cropped", "corner", "extent", "size"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(drawn, name)[:7])
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        assert (training_geometry(sizes, seed, epoch, config).size != drawn.size).any()


def test_random_words_are_pinned():
    """A resumed run must see the same data with any later NumPy."""
    expected = [0.6540259101757502, 0.41013720759821914, 0.8021299607818022]
    np.testing.assert_array_equal(uniform(42, 7, 0, (3,)), expected)


def test_images_smaller_than_a_crop_keep_their_sides():
    config = _config(crop_probability=1.0, crop_scales=(64,), crop_min=100, crop_max=120, scales=(64, 96), max_size=160)
    geometry = training_geometry(np.tile(np.int32([64, 90]), (500, 1)), 0, 0, config)
    assert (geometry.extent == [64, 90]).all() and (geometry.corner == 0).all()
    wide = training_geometry(np.tile(np.int32([64, 110]), (500, 1)), 0, 0, config)
    assert (wide.extent[:, 0] == 64).all() and set(wide.extent[:, 1]) == set(range(100, 111))


def test_window_is_the_crop_in_stored_pixels():
    geometry = training_geometry(np.tile(np.int32([480, 640]), (400, 1)), 0, 0, _config())
    window = geometry.window()
    assert (window[:, :2] >= 0).all() and (window[:, 2:] <= np.array([480, 640]) + 1e-9).all()
    assert (window[~geometry.cropped] == [0, 0, 480, 640]).all()
    row = np.flatnonzero(geometry.cropped)[0]
    scale = geometry.resized[row] / [480, 640]
    np.testing.assert_allclose(window[row, :2] * scale, geometry.corner[row])
    np.testing.assert_allclose((window[row, 2:] - window[row, :2]) * scale, geometry.extent[row])


def test_slivers_stay_and_empty_boxes_go():
    def pair(*values):
        return np.int32([values])

    crop = Geometry(
        original=pair(100, 100),
        flip=np.array([False]),
        cropped=np.array([True]),
        resized=pair(100, 100),
        corner=pair(50, 50),
        extent=pair(50, 50),
        size=pair(100, 100),
    )
    inside, sliver, touching = [60, 60, 70, 80], [0, 0, 50.01, 100], [0, 0, 50, 100]
    boxes, kept = transform_boxes(np.float32([inside, sliver, touching]), crop, 0)
    assert kept.tolist() == [True, True, False]
    np.testing.assert_allclose(boxes[0], [0.3, 0.4, 0.2, 0.4], rtol=1e-6)
    assert 0 < boxes[1, 2] < 0.001
    empty, kept = transform_boxes(np.zeros((0, 4), np.float32), crop, 0)
    assert empty.shape == (0, 4) and kept.shape == (0,)


def test_a_whole_epoch_of_coco_is_drawn_at_once():
    sizes = np.random.default_rng(0).integers(300, 641, (118_287, 2)).astype(np.int32)
    start = time.process_time()
    training_geometry(sizes, 0, 0, _config())
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "fields",
    [{"scales": ()}, {"crop_scales": ()}, {"crop_min": 700}, {"max_size": 0}, {"flip_probability": 1.5}],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=r"config\.data"):
        check_augmentation(_config(**fields))

"""Made-up batches are such as the loader makes: padding, boxes inside images, sizes that the plan knows."""

import numpy as np
import pytest

from benchmarks.box_counts import coco_box_counts
from benchmarks.synthetic_batches import (
    CLASS_SLOTS,
    fixed_batches,
    planned_batches,
    read_batches,
    useful_share,
    write_batches,
)
from configs.base import base


def _small_plan():
    config = base().data
    config.scales, config.max_size, config.crop_probability, config.buckets = (64, 96), 160, 0.0, 3
    return planned_batches(config, 4, 6)


@pytest.mark.parametrize("make", [lambda: fixed_batches((60, 90), 4, 2), _small_plan])
def test_batches_are_as_the_loader_makes_them(make):
    for batch in make():
        height, width = batch.image.shape[1:3]
        assert height % 32 == width % 32 == 0 and batch.image.dtype == np.uint8
        assert (batch.size <= (height, width)).all() and (batch.size > 0).all()
        for image, (bottom, right) in zip(batch.image, batch.size, strict=True):
            assert not image[bottom:].any() and not image[:, right:].any()
            assert image[:bottom, :right].std() > 50
        counts = batch.box_valid.sum(1)
        assert (counts >= 1).all() and (np.sort(batch.box_valid)[:, ::-1] == batch.box_valid).all()
        low, high = (batch.boxes[..., :2] + sign * batch.boxes[..., 2:] / 2 for sign in (-1, 1))
        assert low.min() >= 0 and high.max() <= 1 + 1e-6 and (batch.boxes[batch.box_valid][:, 2:] > 0).all()
        assert not batch.boxes[~batch.box_valid].any() and not batch.labels[~batch.box_valid].any()
        assert set(np.unique(batch.labels[batch.box_valid])) <= set(range(1, CLASS_SLOTS))


def test_planned_batches_come_in_a_few_frames_with_little_padding():
    batches = _small_plan()
    frames = {batch.image.shape for batch in batches}
    assert 1 < len(frames) <= 3
    assert 0.5 < useful_share(batches) < 1


def test_useful_share_is_that_of_images():
    assert useful_share(fixed_batches((32, 48), 2, 1)) == 0.75


def test_box_counts_have_the_mean_of_coco():
    counts = coco_box_counts(1000, 63)
    assert 6.5 < counts.mean() < 7.5 and counts.min() == 1 and counts.max() <= 63
    assert (np.diff(counts) >= 0).all()


def test_a_file_gives_the_same_batches(tmp_path):
    batches = _small_plan()
    write_batches(tmp_path / "batches.npz", batches)
    for written, read in zip(batches, read_batches(tmp_path / "batches.npz"), strict=True):
        for field in written._fields:
            np.testing.assert_array_equal(getattr(written, field), getattr(read, field))

"""Plans: every image once, every output in its frame, the promised number of steps, little padding."""

import itertools
import time

import numpy as np
import pytest

from benchmarks.input_pipeline import coco_sizes, useful_shares
from configs.base import base
from deperceiver_jax.data.batches.geometry import evaluation_geometry, training_geometry
from deperceiver_jax.data.batches.plan import (
    GRID,
    choose_buckets,
    evaluation_buckets,
    evaluation_plan,
    host_rows,
    training_buckets,
    training_plan,
)
from deperceiver_jax.errors import UserError


def _config(**fields):
    config = base().data
    config.update(fields)
    return config


def _odd_sizes(count, seed=0):
    """Sizes of all kinds: tiny, huge, square, and strips of up to 40 to 1."""
    rng = np.random.default_rng(seed)
    area, ratio = rng.uniform(2_000, 4_000_000, count), np.exp(rng.uniform(-3.6, 3.6, count))
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1)
    return np.maximum(sizes, 1).astype(np.int32)


@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("count", [97, 1000])
def test_an_epoch_holds_every_image_at_most_once(count, batch_size):
    sizes, config = np.resize(coco_sizes(), (count, 2)), _config()
    buckets = training_buckets(sizes, config)
    assert len(buckets) == 8 and not (buckets % GRID).any()
    for epoch in range(3):
        outputs = training_geometry(sizes, 1, epoch, config).size
        plan = training_plan(outputs, buckets, 1, epoch, batch_size)
        assert plan.example.shape == (count // batch_size, batch_size)
        assert plan.bucket.dtype == plan.example.dtype == np.int32
        counts = np.bincount(plan.example.ravel(), minlength=count)
        assert (counts == 0).sum() < batch_size and counts.max() <= 2
        assert (counts == 2).sum() < batch_size
        assert (outputs[plan.example] <= buckets[plan.bucket][:, None]).all()


def test_plans_are_reproducible_and_differ_by_epoch_and_seed():
    sizes, config = np.resize(coco_sizes(), (400, 2)), _config()
    buckets = training_buckets(sizes, config)
    outputs = training_geometry(sizes, 1, 2, config).size
    first = training_plan(outputs, buckets, 1, 2, 8)
    again = training_plan(outputs, training_buckets(sizes, config), 1, 2, 8)
    np.testing.assert_array_equal(first.example, again.example)
    np.testing.assert_array_equal(first.bucket, again.bucket)
    for seed, epoch in [(1, 3), (2, 2)]:
        assert (training_plan(outputs, buckets, seed, epoch, 8).example != first.example).any()


def test_buckets_come_in_random_order():
    sizes, config = np.resize(coco_sizes(), (4000, 2)), _config()
    buckets = training_buckets(sizes, config)
    plan = training_plan(training_geometry(sizes, 0, 0, config).size, buckets, 0, 0, 8)
    share = np.bincount(plan.bucket) / len(plan.bucket)
    repeats = (plan.bucket[1:] == plan.bucket[:-1]).mean()
    assert abs(repeats - (share**2).sum()) < 0.06


@pytest.mark.parametrize("fields", [{}, {"crop_probability": 0.0}, {"crop_probability": 1.0}, {"buckets": 1}])
def test_every_draw_fits(fields):
    """No epoch may draw what the buckets, which were chosen beforehand, cannot hold."""
    sizes, config = _odd_sizes(300), _config(**fields)
    buckets = training_buckets(sizes, config)
    for epoch in range(40):
        outputs = training_geometry(sizes, 9, 1000 + epoch, config).size
        assert (outputs[:, None] <= buckets).all(-1).any(1).all()
        assert len(training_plan(outputs, buckets, 9, epoch, 16).example) == 300 // 16


def test_every_draw_of_small_images_fits():
    sizes = np.random.default_rng(0).integers(20, 140, (200, 2)).astype(np.int32)
    fields = {"scales": (64, 96, 128), "max_size": 192, "crop_scales": (80, 110), "crop_min": 64, "crop_max": 100}
    config = _config(**fields, buckets=3)
    buckets = training_buckets(sizes, config)
    assert len(buckets) <= 3
    for epoch in range(100):
        outputs = training_geometry(sizes, 5, epoch, config).size
        assert (outputs[:, None] <= buckets).all(-1).any(1).all()


def test_two_rests_that_no_bucket_unites_still_make_a_batch():
    config = _config(crop_probability=0.0, scales=(100,), max_size=400)
    sizes = np.int32([[100, 400]] * 5 + [[400, 100]] * 6)
    buckets = training_buckets(sizes, config)
    assert len(buckets) == 2
    plan = training_plan(training_geometry(sizes, 0, 0, config).size, buckets, 0, 0, 8)
    assert plan.example.shape == (1, 8)
    assert set(plan.example[0]) == set(range(5, 11))


def test_rests_move_to_a_larger_bucket():
    """7 small and 9 large images in batches of 8: one large image keeps company with the small ones."""
    outputs = np.int32([[32, 32]] * 7 + [[64, 64]] * 9)
    plan = training_plan(outputs, np.int32([[32, 32], [64, 64]]), 0, 0, 8)
    assert sorted(plan.example.ravel()) == list(range(16)) and plan.bucket.tolist() == [1, 1]


def test_useful_pixels_on_cocos_sizes():
    sizes = np.resize(coco_sizes(), (8000, 2))
    shares = useful_shares(sizes, _config())
    assert shares["planned batches of 16, 8 buckets"] >= 0.78
    assert shares["planned batches of 16, 5 buckets"] >= 0.70
    assert shares["random batches of 16, padded to their largest"] < 0.52


def test_choice_is_close_to_the_best():
    """Against all pairs beside the largest size, on many small problems."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        outputs = rng.integers(1, 10, (60, 2)).astype(np.int32) * GRID
        outputs[:, 1] = np.maximum(outputs[:, 1], outputs[:, 0])  # landscape: one largest size
        chosen = choose_buckets(outputs, outputs, 3)
        assert (chosen[-1] == outputs.max(0)).all()
        candidates = [np.array(pair) * GRID for pair in itertools.product(range(1, 10), repeat=2)]
        best = min(_padded(outputs, np.stack([a, b, chosen[-1]])) for a, b in itertools.combinations(candidates, 2))
        assert _padded(outputs, chosen) <= 1.03 * best


def _padded(outputs, buckets):
    area = np.where((outputs[:, None] <= buckets).all(-1), buckets.prod(1), 10**9)
    return area.min(1).sum()


def test_large_images_take_a_coarser_grid():
    config = _config(scales=(2000, 3000), max_size=6000, crop_probability=0.0)
    start = time.process_time()
    buckets = training_buckets(_odd_sizes(2000), config)
    assert time.process_time() - start < 10
    assert not (buckets % 128).any()


def test_evaluation_plan_holds_every_image_once():
    sizes, config = coco_sizes(), _config()
    buckets = evaluation_buckets(sizes, config)
    assert len(buckets) == config.eval_buckets
    outputs = evaluation_geometry(sizes, config).size
    plan = evaluation_plan(outputs, buckets, 12)
    real = plan.example >= 0
    assert sorted(plan.example[real]) == list(range(160))
    assert (~real.all(1)).sum() <= 2
    assert (real[:, :-1] >= real[:, 1:]).all()  # an empty place never precedes an image
    assert (outputs[np.maximum(plan.example, 0)] <= buckets[plan.bucket][:, None])[real].all()


def test_one_image_is_a_plan():
    sizes = np.int32([[480, 640]])
    buckets = evaluation_buckets(sizes, _config())
    plan = evaluation_plan(evaluation_geometry(sizes, _config()).size, buckets, 4)
    assert plan.example.tolist() == [[0, -1, -1, -1]] and buckets.tolist() == [[800, 1088]]


def test_host_rows():
    rows = [host_rows(12, index, 3, "config.data.batch_size") for index in range(3)]
    assert [list(range(12))[row] for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(UserError, match="config.data.batch_size is 10, .* over 4 processes"):
        host_rows(10, 0, 4, "config.data.batch_size")


def test_an_output_without_a_frame_is_an_error():
    with pytest.raises(ValueError, match="no bucket holds"):
        training_plan(np.int32([[64, 64]] * 4), np.int32([[32, 64]]), 0, 0, 2)


def test_landscape_and_portrait_that_round_to_one_size_are_one_bucket():
    outputs = np.array([[96, 70], [120, 128], [128, 120]])
    np.testing.assert_array_equal(choose_buckets(outputs, outputs, 3), [[96, 96], [128, 128]])
    np.testing.assert_array_equal(choose_buckets(outputs, outputs, 2), [[96, 96], [128, 128]])

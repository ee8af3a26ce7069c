"""Batches: what they hold, who gets which, and that the step number alone decides."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data.batches.geometry import evaluation_geometry, training_geometry, transform_boxes
from deperceiver_jax.data.batches.loader import EvaluationBatches, TrainBatches
from deperceiver_jax.data.batches.views import plan_views
from deperceiver_jax.errors import UserError
from tests.data.fake_source import FakeSource

SHAPES = [(48, 64), (64, 48), (40, 72), (60, 60), (52, 66)] * 5


def _config(**fields):
    config = base().data
    config.update(num_workers=0, batch_size=4, buckets=3, eval_buckets=2)
    config.update(scales=(48, 64, 80), max_size=128, crop_scales=(40, 56), crop_min=32, crop_max=48)
    config.update(eval_scale=64, eval_max_size=112)
    config.update(fields)
    return config


def _first(batches, count):
    iterator = iter(batches)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def _assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for array, twin in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, twin)


def test_a_training_batch_keeps_the_contract():
    source, config = FakeSource(SHAPES), _config()
    batches = TrainBatches(source, config, seed=3)
    assert batches.steps_per_epoch == 6 and len(batches.buckets) <= 3
    geometry = training_geometry(source.sizes, 3, 0, config)
    for batch in _first(batches, 6):
        height, width = batch.image.shape[1:3]
        assert (height, width) in batches.buckets
        assert batch.image.dtype == np.uint8 and batch.image.shape == (4, height, width, 3)
        assert batch.size.dtype == batch.original_size.dtype == batch.example.dtype == batch.labels.dtype == np.int32
        assert batch.boxes.dtype == np.float32 and batch.box_valid.dtype == bool
        assert batch.boxes.shape == (4, 3, 4) and batch.labels.shape == batch.box_valid.shape == (4, 3)
        np.testing.assert_array_equal(batch.size, geometry.size[batch.example])
        np.testing.assert_array_equal(batch.original_size, source.sizes[batch.example])
        assert (batch.boxes >= 0).all() and (batch.boxes <= 1).all()
        for row, example in enumerate(batch.example):
            real_height, real_width = batch.size[row]
            assert batch.image[row, :real_height, :real_width].std() > 5
            assert not batch.image[row, real_height:].any() and not batch.image[row, :, real_width:].any()
            boxes, labels = source.targets(example)
            boxes, kept = transform_boxes(boxes, geometry, example)
            count = len(boxes)
            np.testing.assert_array_equal(batch.boxes[row, :count], boxes)
            np.testing.assert_array_equal(batch.labels[row, :count], labels[kept])
            assert batch.box_valid[row].tolist() == [True] * count + [False] * (3 - count)
            assert not batch.boxes[row, count:].any() and not batch.labels[row, count:].any()


def test_hosts_share_a_batch():
    source, config = FakeSource(SHAPES), _config()
    whole = _first(TrainBatches(source, config, seed=0), 8)
    hosts = [_first(TrainBatches(source, config, seed=0, process_index=i, process_count=2), 8) for i in range(2)]
    joined = [type(one)(*map(np.concatenate, zip(one, other, strict=True))) for one, other in zip(*hosts, strict=True)]
    _assert_equal(joined, whole)


def test_a_host_reads_its_share_of_an_epoch_alone(monkeypatch):
    """Of four hosts, a fourth of the pictures each, and no picture twice."""
    source, config, read = FakeSource(SHAPES), _config(), []
    stored = FakeSource.image_bytes
    monkeypatch.setattr(FakeSource, "image_bytes", lambda self, at: read.append(at) or stored(self, at))
    for host in range(4):
        batches = TrainBatches(source, config, seed=0, process_index=host, process_count=4)
        before = len(read)
        for step in range(batches.steps_per_epoch):
            batches._make(step, lambda shape: np.empty(shape, np.uint8))
        assert len(read) - before == batches.steps_per_epoch * config.batch_size // 4
    assert len(set(read)) == len(read)


def test_a_run_resumes_at_any_step():
    source, config = FakeSource(SHAPES), _config()
    whole = _first(TrainBatches(source, config, seed=0), 15)  # into the third epoch
    for start in (1, 6, 11):
        _assert_equal(_first(TrainBatches(source, config, seed=0, start_step=start), 15 - start), whole[start:])
    assert any((a.example != b.example).any() for a, b in zip(whole[:6], whole[6:12], strict=True))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_nothing(workers):
    source = FakeSource(SHAPES)
    expected = _first(TrainBatches(source, _config(), seed=0, start_step=2), 9)
    found = _first(TrainBatches(source, _config(num_workers=workers), seed=0, start_step=2), 9)
    _assert_equal(found, expected)


def test_every_image_is_evaluated_once():
    source, config = FakeSource(SHAPES[:23]), _config()
    batches = EvaluationBatches(source, config, batch_size=4)
    found = list(batches)
    assert len(found) == len(batches) and len(batches.buckets) <= 2
    geometry = evaluation_geometry(source.sizes, config)
    seen = []
    for batch in found:
        for row, example in enumerate(batch.example):
            if example < 0:
                assert not batch.image[row].any() and not batch.box_valid[row].any()
                assert tuple(batch.size[row]) == tuple(batch.original_size[row]) == batch.image.shape[1:3]
                continue
            seen.append(example)
            assert tuple(batch.size[row]) == tuple(geometry.size[example])
            assert tuple(batch.original_size[row]) == SHAPES[example]
            assert batch.box_valid[row].sum() == example % 4
    assert sorted(seen) == list(range(23))
    halves = [list(EvaluationBatches(source, config, batch_size=4, process_index=i, process_count=2)) for i in (0, 1)]
    joined = [type(one)(*map(np.concatenate, zip(one, other, strict=True))) for one, other in zip(*halves, strict=True)]
    _assert_equal(joined, found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(workers):
    source = FakeSource(SHAPES[:4], broken={2: b"\xff\xd8 not a jpeg"})
    with pytest.raises(UserError, match=r"002\.jpg is corrupt"):
        _first(TrainBatches(source, _config(num_workers=workers), seed=0), 1)


def test_an_image_of_another_size_is_named():
    source = FakeSource(SHAPES[:4])
    source.sizes[1] = (70, 50)
    with pytest.raises(UserError, match=r"001\.jpg has 64 x 48 pixels .* not 70 x 50"):
        _first(TrainBatches(source, _config(), seed=0), 1)


def test_box_slots():
    source = FakeSource(SHAPES, max_boxes=5)
    assert _first(TrainBatches(source, _config(), seed=0), 1)[0].labels.shape == (4, 5)
    assert _first(TrainBatches(source, _config(max_boxes=9), seed=0), 1)[0].labels.shape == (4, 9)
    with pytest.raises(UserError, match=r"005\.jpg has 5 boxes, more than config\.data\.max_boxes \(4\)"):
        TrainBatches(source, _config(max_boxes=4), seed=0)
    evaluated = EvaluationBatches(FakeSource(SHAPES, max_boxes=0), _config(), batch_size=4)
    assert _first(evaluated, 1)[0].labels.shape == (4, 1)
    evaluated = EvaluationBatches(source, _config(max_boxes=4), batch_size=4)  # of which training has fewer
    assert _first(evaluated, 1)[0].labels.shape == (4, 5)


def test_a_picture_is_decoded_once_for_all_its_views(monkeypatch):
    read, source = [], FakeSource(SHAPES[:6])
    image_bytes = source.image_bytes
    monkeypatch.setattr(source, "image_bytes", lambda position: read.append(position) or image_bytes(position))
    settings = base().eval
    settings.flip, settings.tiles.size = True, 32
    views = plan_views(source.sizes, _config(), settings)
    batches = EvaluationBatches(source, _config(eval_buckets=1), batch_size=4, views=views)
    assert len(views.example) > 60
    for step in range(len(batches)):
        batches._make(step, lambda shape: np.zeros(shape, np.uint8))
    assert read == list(range(6))


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="None of the 25 images in /x, split train, has a box to learn; an annotation"):
        TrainBatches(FakeSource(SHAPES, max_boxes=0), _config(directory="/x"), seed=0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch_size": 26}, "has 25 images, fewer than one batch of 26"),
        ({"batch_size": 0}, "config.data.batch_size is 0"),
        ({"buckets": 0}, "config.data.buckets 0"),
        ({"scales": ()}, "config.data.scales"),
        ({"eval_buckets": 0}, "config.data.eval_buckets is 0; it must be at least 1"),
    ],
)
def test_impossible_settings(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainBatches(FakeSource(SHAPES), _config(**fields), seed=0)


def test_importing_the_data_rooms_leaves_jax_alone():
    program = "import sys, deperceiver_jax.data, deperceiver_jax.data.batches.loader; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

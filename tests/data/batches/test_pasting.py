"""Pasted objects: what their boxes say is what their pixels show, and the step number alone decides."""

import io
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from configs.base import base
from deperceiver_jax.data.batches.geometry import uniform
from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.batches.pasting import Member, check_pasting, draw_pasted
from deperceiver_jax.errors import UserError

PASTE = dict(paste_objects=6, paste_max_side=40.0)
PINNED = [0.5367608405063914, 0.3240095001949239]  # a resumed run must see the same data with any later NumPy
OBJECTS = 3  # of every picture


class Painted:
    """Black pictures with OBJECTS rectangles; those whose labels are in `shown` are painted, a channel each."""

    sizes = np.int32([(96, 120), (120, 96), (100, 110), (90, 130), (110, 100), (96, 96), (130, 90), (104, 118)])
    max_boxes = OBJECTS

    def __init__(self, shown: Sequence[int] = ()):
        self.shown = shown

    def __len__(self) -> int:
        return len(self.sizes)

    def filename(self, position: int) -> str:
        return f"{position}.png"

    def orientation(self, position: int) -> int:
        return 1

    def targets(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(position)
        low = np.int32([(6, 8), (50, 12), (14, 52)]) + rng.integers(0, 8, (OBJECTS, 2))
        boxes = np.concatenate([low, low + rng.integers(10, 26, (OBJECTS, 2))], axis=1)
        return boxes.astype(np.float32), OBJECTS * position + np.arange(OBJECTS, dtype=np.int32)

    def image_bytes(self, position: int) -> bytes:
        image = np.zeros((*self.sizes[position], 3), np.uint8)
        for (left, top, right, bottom), label in zip(*self.targets(position), strict=True):
            if label in self.shown:
                image[int(top) : int(bottom), int(left) : int(right), self.shown.index(label)] = 255
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()


def _config(**fields):
    config = base().data
    config.update(num_workers=0, batch_size=8, buckets=2, scales=(96, 112, 128), max_size=160, max_boxes=16)
    config.update(crop_scales=(90, 110), crop_min=80, crop_max=100)
    config.update(fields)
    return config


def _first(config, count, shown=(), **where):
    stream = iter(TrainBatches(Painted(shown), config, seed=5, **where))
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def _edges(share):
    """Where along an axis what is painted lies, (start, end), by its amount and its centre of mass."""
    length = share.sum()
    middle = (share * (np.arange(len(share)) + 0.5)).sum() / length
    return middle - length / 2, middle + length / 2


def test_boxes_are_where_the_pixels_are():
    """Of every rectangle, both edges along both axes to a fifth of a pixel: the picture's own and the pasted ones."""
    config, checked = _config(**PASTE), 0
    blank = _first(config, 1)[0]
    for first in range(0, OBJECTS * len(Painted.sizes), 3):
        shown = range(first, first + 3)
        batch = _first(config, 1, shown)[0]
        painted = (batch.image.astype(np.float64) - blank.image) / 255
        for row, slot in np.argwhere(batch.box_valid & np.isin(batch.labels, shown)):
            height, width = batch.size[row]
            cx, cy, w, h = batch.boxes[row, slot] * [width, height, width, height]
            if min(w, h) < 5:
                continue
            share = painted[row, :height, :width, batch.labels[row, slot] - first]
            low, high = max(int(cx - w / 2) - 2, 0), int(cx + w / 2) + 3
            found = _edges(share[int(cy - h / 5) : int(cy + h / 5) + 1, low:high].mean(axis=0))
            np.testing.assert_allclose(np.add(found, low), [cx - w / 2, cx + w / 2], atol=0.2)
            low, high = max(int(cy - h / 2) - 2, 0), int(cy + h / 2) + 3
            found = _edges(share[low:high, int(cx - w / 5) : int(cx + w / 5) + 1].mean(axis=1))
            np.testing.assert_allclose(np.add(found, low), [cy - h / 2, cy + h / 2], atol=0.2)
            checked += 1
    assert checked > 30


def test_nothing_lies_outside_the_boxes():
    config, labels = _config(**PASTE), range(OBJECTS * len(Painted.sizes))
    blank = _first(config, 1)[0]
    for first in range(0, len(labels), 3):
        batch = _first(config, 1, labels[first : first + 3])[0]
        painted = (batch.image != blank.image).any(axis=-1)
        for row, (height, width) in enumerate(batch.size.tolist()):
            for cx, cy, w, h in batch.boxes[row, batch.box_valid[row]] * [width, height, width, height]:
                low, high = np.int32([cy - h / 2, cx - w / 2]) - 2, np.int32([cy + h / 2, cx + w / 2]) + 3
                painted[row, max(low[0], 0) : high[0], max(low[1], 0) : high[1]] = False
        assert not painted.any()


def test_sizes_order_and_own_boxes_are_those_without():
    plain, pasted = (_first(_config(**how), 5, range(3)) for how in ({}, PASTE))
    for one, other in zip(plain, pasted, strict=True):
        for name in ("size", "original_size", "example"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.image.shape == other.image.shape
        np.testing.assert_array_equal(one.boxes[one.box_valid], other.boxes[one.box_valid])
        np.testing.assert_array_equal(one.labels[one.box_valid], other.labels[one.box_valid])
        assert other.box_valid.sum() > one.box_valid.sum()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_step_number_alone_decides(workers):
    shown = range(3)
    whole = _first(_config(**PASTE), 5, shown)
    resumed = _first(_config(num_workers=workers, **PASTE), 3, shown, start_step=2)
    for one, other in zip(whole[2:], resumed, strict=True):
        for array, twin in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, twin)


@pytest.mark.parametrize("batch_size, count", [(8, 4), (6, 2)])
def test_hosts_share_what_one_would_load(batch_size, count):
    """A group of four pictures may lie in the rows of several hosts, and the last one of a batch may be smaller."""
    shown, config = range(3), _config(batch_size=batch_size, **PASTE)
    whole = _first(config, 2, shown)
    hosts = [_first(config, 2, shown, process_index=i, process_count=count) for i in range(count)]
    for step, batch in enumerate(whole):
        for name, array in batch._asdict().items():
            parts = [getattr(host[step], name) for host in hosts]
            np.testing.assert_array_equal(np.concatenate(parts), array)


def test_every_seed_epoch_and_example_has_numbers_of_its_own():
    member = Member((100, 120), (0, 0, 100, 120), np.float32([[0.5, 0.5, 0.1, 0.1]]), np.int32([7]))
    keys = list(itertools.product((3, 4), repeat=3))
    drawn = [draw_pasted([member] * 4, 1, 20, _config(paste_objects=20), key) for key in keys]
    assert len({str(pasted.pieces) for pasted in drawn}) == len(keys)
    np.testing.assert_array_equal(uniform(42, 7, (3, 11), (2,)), PINNED)


def test_slots_are_never_exceeded():
    member = Member((100, 100), (0, 0, 100, 100), np.float32([[0.5, 0.5, 0.06, 0.06]]), np.zeros(1, np.int32))
    config = _config(paste_objects=20)
    counts = [[len(draw_pasted([member], 0, room, config, (0, 0, n)).labels) for n in range(30)] for room in (0, 3, 20)]
    assert max(counts[0]) == 0 and max(counts[1]) == 3 and max(counts[2]) > 10 and min(counts[2]) < 3


def test_pasted_objects_are_small_whole_and_apart():
    small, large, crowded, beside = (
        [0.5, 0.5, 0.1, 0.1],
        [0.2, 0.8, 0.3, 0.3],
        [0.8, 0.2, 0.1, 0.1],
        [0.87, 0.2, 0.1, 0.1],
    )
    border = [0.03, 0.3, 0.06, 0.1]
    member = Member(
        (200, 200), (0, 0, 200, 200), np.float32([small, large, crowded, beside, border]), np.arange(5, dtype=np.int32)
    )
    empty = Member((200, 200), (0, 0, 200, 200), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    config, count = _config(paste_objects=9, paste_max_side=30.0), 0
    for own, example in itertools.product(range(2), range(30)):
        pasted = draw_pasted([empty, member], own, 30, config, (0, 0, example))
        assert set(pasted.labels.tolist()) <= {0} and len(pasted.pieces) == len(pasted.boxes) == len(pasted.labels)
        np.testing.assert_allclose(pasted.boxes[:, 2:], np.tile(small[2:], (len(pasted.boxes), 1)), rtol=1e-5)
        boxes = np.concatenate([[empty, member][own].boxes, pasted.boxes])
        low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
        shared = (np.maximum(low[:, None], low) < np.minimum(high[:, None], high) - 1e-6).all(axis=-1)
        assert not (shared & ~np.eye(len(low), dtype=bool))[len(low) - len(pasted.boxes) :].any()
        count += len(pasted.boxes)
    assert count > 60


@pytest.mark.parametrize("fields", [{"paste_objects": -1}, {"paste_objects": 10**9}, {"paste_max_side": float("nan")}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=rf"config\.data\.{next(iter(fields))}"):
        check_pasting(_config(**fields))

"""Hints: noise within its bounds, one for every copy of every slot, from the key alone."""

import jax
import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.losses.hints import make_hints
from deperceiver_jax.structures import Batch


def batch_of(boxes, valid):
    boxes, valid = np.asarray(boxes, np.float32), np.asarray(valid)
    size = np.full((len(boxes), 2), 8, np.int32)
    image = np.zeros((len(boxes), 8, 8, 3), np.uint8)
    return Batch(image, size, size, np.arange(len(boxes), dtype=np.int32), boxes, valid.astype(np.int32), valid)


def test_hints_are_near_their_boxes():
    loss = base().loss
    loss.hint_copies, loss.hint_noise = 50, 0.4
    box = np.array([0.4, 0.6, 0.2, 0.1], np.float32)
    hints = make_hints(batch_of([[box, [0.0] * 4]], [[True, False]]), loss, jax.random.key(0))
    assert hints.boxes.shape == (1, 50, 2, 4) and hints.valid.shape == (1, 50, 2)
    assert np.all(hints.valid[..., 0]) and not np.any(hints.valid[..., 1])
    drawn = np.asarray(hints.boxes[0, :, 0])
    shift, growth = (drawn[:, :2] - box[:2]) / box[2:], np.log(drawn[:, 2:] / box[2:])
    for noise in (shift, growth):
        assert np.abs(noise).max() <= 0.4 + 1e-5 and np.abs(noise).max(axis=0).min() > 0.3
        assert len(np.unique(noise)) == 100
    other = make_hints(batch_of([[box, [0.0] * 4]], [[True, False]]), loss, jax.random.key(1))
    assert not np.any(other.boxes[0, :, 0] == hints.boxes[0, :, 0])


def test_no_hints_unless_asked_for():
    loss = base().loss
    assert make_hints(batch_of([[[0.5] * 4]], [[True]]), loss, jax.random.key(0)) is None
    loss.hint_noise = -1.0
    with pytest.raises(UserError, match="hint_copies is 0 and hint_noise -1.0; neither may be below 0"):
        make_hints(batch_of([[[0.5] * 4]], [[True]]), loss, jax.random.key(0))

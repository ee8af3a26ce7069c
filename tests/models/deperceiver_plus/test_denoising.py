"""Denoising queries: noise within its bounds, one for every copy of every slot, from the key alone."""

import jax
import numpy as np
import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deperceiver_plus.denoising import Denoising, denoising_mask
from deperceiver_jax.structures import Targets

BOX = np.array([0.4, 0.6, 0.2, 0.1], np.float32)
TARGETS = Targets(np.stack([BOX, np.zeros(4, np.float32)])[None], np.int32([[1, 0]]), np.array([[True, False]]))


def test_queries_are_near_their_boxes():
    draw = jax.jit(Denoising(copies=50, noise=0.4).queries)
    queries, other = (jax.device_get(draw(TARGETS, jax.random.key(seed))) for seed in (0, 1))
    assert queries.boxes.shape == (1, 50, 2, 4) and queries.valid.shape == (1, 50, 2)
    assert np.all(queries.valid[..., 0]) and not np.any(queries.valid[..., 1])
    drawn = queries.boxes[0, :, 0]
    shift, growth = (drawn[:, :2] - BOX[:2]) / BOX[2:], np.log(drawn[:, 2:] / BOX[2:])
    for noise in (shift, growth):
        assert np.abs(noise).max() <= 0.4 + 1e-5
        assert noise.min(axis=0).max() < -0.3 and noise.max(axis=0).min() > 0.3
        assert len(np.unique(noise)) == 100
    assert not np.any(other.boxes[0, :, 0] == drawn)


def test_none_unless_asked_for():
    assert Denoising(copies=0, noise=0.4).queries(TARGETS, jax.random.key(0)) is None
    assert Denoising(copies=2, noise=0.4).queries(None, None) is None
    with pytest.raises(UserError, match="config.model.denoising.copies is -1; it must be at least 0"):
        Denoising(copies=-1, noise=0.4)


def test_a_copy_attends_to_itself_and_answers_attend_to_answers():
    draw = Denoising(copies=2, noise=0.1).queries
    mask = jax.device_get(jax.jit(lambda key: denoising_mask(draw(TARGETS, key), num_latents=3))(jax.random.key(0)))
    attends = mask.bias[0, 0] == 0
    expected = np.zeros((7, 7), bool)
    expected[:3, :3] = expected[3:5, 3:5] = expected[5:, 5:] = True
    np.testing.assert_array_equal(attends, expected)
    np.testing.assert_array_equal(mask.key_valid, [[True] * 3 + [True, False] * 2])

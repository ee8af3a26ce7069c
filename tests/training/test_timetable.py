"""Ends and intervals."""

import pytest

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.training.timetable import due, ends_early, last_step


def train_config(**fields):
    config = base().train
    config.update(fields)
    return config


def test_steps_decide_before_epochs():
    assert last_step(train_config(num_epochs=3), 10) == 30
    assert last_step(train_config(num_epochs=3, num_steps=7), 10) == 7


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 8, 12, 15]), (0, [5, 10, 15]), (-1, [15]), (100, [15])], ids=str)
def test_intervals_and_the_last_step(every, steps):
    is_due = due(train_config(eval_every=every), "eval_every", 5, 15)
    assert [step for step in range(1, 16) if is_due(step)] == steps


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(num_epochs=0), "nothing to train"),
        (dict(num_steps=-1), "config.train.num_steps is -1"),
        (dict(overfit=-1), "config.train.overfit is -1"),
        (dict(patience=-1), "config.train.patience is -1"),
        (dict(log_every=0), "config.train.log_every is 0"),
        (dict(eval_every=-2), "config.train.eval_every is -2"),
    ],
    ids=lambda value: str(*value) if isinstance(value, dict) else "",
)
def test_impossible_timetables(fields, sentence):
    config = train_config(**fields)
    with pytest.raises(UserError, match=sentence):
        last_step(config, 5)
        due(config, "eval_every", 5, 15)


@pytest.mark.parametrize(
    ("fields", "aps", "ended"),
    [
        (dict(), [0.5, 0.1, 0.1, 0.1], ""),
        (dict(patience=2), [], ""),
        (dict(patience=2), [0.1, 0.5, 0.4], ""),
        (dict(patience=2), [0.1, 0.5, 0.4, 0.5], "AP, 0.500 after step 20, has not risen in 2 evaluations"),
        (dict(patience=2), [0.1, 0.5, 0.4, 0.6], ""),
        (dict(patience=1), [-1.0, -1.0], "AP, -1.000 after step 10, has not risen in 1 evaluation"),
        (dict(overfit=8), [0.5, 0.89], ""),
        (dict(overfit=8), [0.5, 0.91], "the images are learned"),
    ],
    ids=str,
)
def test_what_ends_a_run_before_its_last_step(fields, aps, ended):
    evaluations = [{"step": 10 * n, "AP": ap, "AP50": ap} for n, ap in enumerate(aps, 1)]
    assert ends_early(train_config(**fields), evaluations) == ended

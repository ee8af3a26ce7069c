"""Reasons by what a run shows, on lines that are written down here; test_overfit.py has real runs."""

import math

import pytest

from configs import demo
from deperceiver_jax.training.diagnosis import Circumstances, likely_reason


def known(**fields):
    """A run in which nothing is wrong, but for these."""
    config = demo.get_config("detr")
    config.update_from_flattened_dict({name: fields.pop(name) for name in list(fields) if "." in name})
    return Circumstances(config, **(dict(untrained=False, params_norm=100.0, stride=16, fullest=8, side=20.0) | fields))


def lines(losses, update_norm=0.2, **terms):
    rows = enumerate(losses, 1)
    return [
        {"step": 10 * n, "loss": x, "update_norm": update_norm, "lr": 1e-3, "surplus_boxes": 0.0} | terms
        for n, x in rows
    ]


FALLING, STILL = (9.0, 8.0, 7.0), (9.0, 9.1, 9.0)


RATE = "the learning rate, 0.001 (config.optimizer.learning_rate), is far too"
STEPS = "it has not trained for long enough: its loss still falls, from 9 to 7 in 30 steps"
CELLS = (
    "the boxes are far smaller than a cell of the finest map: half of them are below 7 pixels in the image that the "
    "detector sees (config.data.eval_scale is 112), and a cell has 16 (config.model.strides)"
)
FROZEN = "parts of the backbone are frozen and as random as they began, because no weights were loaded"


def rate(verdict, share, last):
    changes = f"a step changes the parameters by {share} % of their size"
    return f"{RATE} {verdict}: {changes}, and the loss went from 9 to {last}"


@pytest.mark.parametrize(
    ("run", "rows", "reason"),
    [
        (known(), lines(STILL), ""),
        (known(), [], ""),
        (known(), lines(FALLING), STEPS),
        (known(side=7.0), lines(FALLING), CELLS),
        (known(), lines(STILL, 3.0), rate("high", 3, "9 in 30 steps")),
        (known(side=7.0), lines(FALLING, 20.0), rate("high", 20, "7 in 30 steps")),
        (known(), lines(FALLING, 3.0), STEPS),
        (known(), [*lines(STILL), *lines([math.inf], math.inf)], rate("high", "inf", "inf in 10 steps")),
        (known(), [*lines(STILL), *lines([math.nan], math.nan)], ""),  # the rate may have nothing to do with it
        (known(), lines(STILL, 1e-3), rate("low", 0.001, "9 in 30 steps")),
        (known(untrained=True), lines(FALLING), FROZEN),
        (
            known(fullest=70, untrained=True),
            lines(STILL, surplus_boxes=12.5),
            "an image has 70 objects, but config.model.num_queries is 64, and 12.5 a step found no query",
        ),
        (
            known(**{"eval.max_detections": 5}),
            lines(STILL),
            "an image has 8 objects, but config.eval.max_detections is 5",
        ),
        (
            known(fullest=70, **{"loss.weight_class": 0.0}),
            lines(STILL),
            "config.loss.weight_class is 0, so no query learns which class it is",
        ),
        (known(**{"loss.weight_giou": 0.0}), lines(STILL), ""),  # the other one trains boxes, too
    ],
)
def test_the_first_reason_that_holds(run, rows, reason):
    assert likely_reason(run, rows) == reason

"""Reasons by what a run shows, on lines that are written down here; test_overfit.py has real runs."""

import math

import numpy as np
import pytest

from configs import demo
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.training.diagnosis import Circumstances, does_not_learn, likely_reason


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
        (known(), lines((28.55, 34.6, 28.6)), ""),  # it fell from the second to the third alone
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


CLASSES = ClassMap.from_categories([(7, "cup"), (9, "plate")])


class Split:
    """Three images of 100 x 100 pixels whose targets have these labels."""

    classes, image_ids, sizes = CLASSES, (1, 2, 3), np.full((3, 2), 100)

    def __init__(self, *labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def targets(self, position):
        return None, np.int32(self.labels[position])


SPLIT = Split([0, 0], [1, 0], [1])


def answers(*, categories=(7, 9), spread=40.0, score=0.6):
    """Four detections an image, of these categories in turn, in boxes that lie up to `spread` pixels apart."""
    boxes = [[10.0 + spread * i / 3, 10.0, 20.0, 20.0] for i in range(4)]
    rows = [(image, i, box) for image in (1, 2, 3) for i, box in enumerate(boxes)]
    return [
        {"image_id": image, "category_id": categories[i % len(categories)], "bbox": box, "score": score - i / 100}
        for image, i, box in rows
    ]


def evaluations(*aps, every=200):
    return [{"step": every * n, "AP": ap} for n, ap in enumerate(aps, 1)]


SOFTMAX = {"loss.classification": "softmax_no_object"}
FINE = evaluations(0.1, 0.1, 0.2)


@pytest.mark.parametrize(
    ("run", "results", "found"),
    [
        (evaluations(0, 0.0004, 0), answers(), "AP is 0.000 after 3 evaluations"),
        (FINE, answers(spread=0.9), "all queries of an image give one box"),
        (FINE, answers(spread=1.1), ""),
        (FINE, answers(score=0.09), "no score is above 0.1"),
        (FINE, [], "no score is above 0.1"),
        (FINE, answers(categories=[9]), "all labels are plate"),
        (FINE, answers(), ""),
        (evaluations(0, 0, 0), answers(spread=0, categories=[7]), "AP is 0.000 after 3 evaluations and all queries of "
         "an image give one box and all labels are cup"),
        (evaluations(0), answers(), ""),  # too early
        (evaluations(0, 0), answers(), ""),
        (evaluations(0, 0, 0, every=50), answers(), ""),
        (evaluations(0, 0, 0, 0), answers(), ""),  # it was said after the third
        (evaluations(0, every=1000), answers(), "AP is 0.000 after 1 evaluation"),  # the run's only one
        (evaluations(-1, -1, -1), answers(), ""),  # a split without an object
    ],
)  # fmt: skip
def test_a_run_that_does_not_learn_says_so_once(run, results, found):
    sentence = does_not_learn(known(), lines(FALLING, class_error=100.0), run, results, SPLIT, last=1000)
    assert sentence == (f"The run does not learn: {found}. The likely reason: {STEPS}." if found else "")


@pytest.mark.parametrize(("class_error", "found"), [(100.0, True), (99.0, False)])
def test_queries_below_the_background(class_error, found):
    rows = lines(STILL, class_error=class_error)
    sentence = does_not_learn(known(**SOFTMAX), rows, FINE, answers(score=0.01), SPLIT, last=1000)
    assert sentence == "The run does not learn: no query is matched above the background." * found


def test_one_class_is_right_where_nearly_all_targets_have_it():
    split = Split([0] * 10, [0] * 10, [0, 1])
    assert not does_not_learn(known(), lines(STILL), FINE, answers(categories=[7]), split, last=1000)

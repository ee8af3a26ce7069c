"""What counts as the same answer, and how the first difference is named."""

import numpy as np
import pytest

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.export.check import Comparison
from deperceiver_jax.export.program import Answers
from deperceiver_jax.structures import Batch

CLASSES = ClassMap.from_categories([(3, "cat"), (9, "dog")])
RNG = np.random.default_rng(0)
ANSWERS = Answers(
    boxes=RNG.uniform(0, 90, (2, 4, 4)).astype(np.float32),
    scores=np.float32([[0.9, 0.8, 0.6, 0.1]] * 2),
    labels=np.int32([[0, 1, 1, 0]] * 2),
    query_logits=RNG.standard_normal((2, 5, 3)).astype(np.float32),
    query_boxes=RNG.uniform(0, 1, (2, 5, 4)).astype(np.float32),
)
NONE = np.zeros((2, 0))
BATCH = Batch(
    np.zeros((2, 64, 96, 3), np.uint8), np.int32([[50, 90]] * 2), np.int32([[100, 180]] * 2), np.arange(2), *[NONE] * 3
)


def compared(found: Answers, lead=None, batch=BATCH) -> Comparison:
    comparison = Comparison("x.onnx", CLASSES, threshold=0.5)
    comparison.add(batch, "{}.jpg".format, ANSWERS, lead, found)
    return comparison


def changed(name, place, value) -> Answers:
    array = getattr(ANSWERS, name).copy()
    array[place] = value
    return ANSWERS._replace(**{name: array})


def test_the_same_answers():
    comparison = compared(changed("query_logits", (1, 2, 1), ANSWERS.query_logits[1, 2, 1] + 5e-5))
    assert (comparison.pictures, comparison.detections, comparison.ties) == (2, 6, 0)
    assert 4e-5 < comparison.logits < 6e-5 and comparison.boxes == 0
    assert "2 pictures, logits within 5.0e-05, boxes within 0.0e+00, the same 6 detections above 0.5" in str(comparison)


@pytest.mark.parametrize(
    ("name", "place", "value", "sentence"),
    [
        (
            "query_logits",
            (1, 2, 1),
            7.0,
            "at 1.jpg (50 x 90 in a frame of 64 x 96), query 2, logit of dog is 7 in the file",
        ),
        ("query_logits", (0, 0, 2), 7.0, "query 0, logit of no object is 7"),
        ("query_boxes", (0, 4, 1), 0.0, "query 4, cy is 0 in the file and "),
        ("query_boxes", (0, 4, 3), np.nan, "query 4, h is nan"),
        ("labels", (0, 1), 0, "only JAX has the detection dog with score 0.8000"),
        ("scores", (0, 3), 0.7, "only the file has the detection cat with score 0.7000"),
        ("boxes", (1, 0, 2), 200.0, "only JAX has the detection cat with score 0.9000"),
    ],
)
def test_the_first_difference_is_named(name, place, value, sentence):
    with pytest.raises(UserError, match="x.onnx is not written: at ") as error:
        compared(changed(name, place, value))
    assert sentence in str(error.value)


def test_what_is_below_the_threshold_may_differ():
    compared(changed("scores", (0, 3), 0.3))


def test_images_that_fill_up_a_batch_do_not_count():
    batch = BATCH._replace(example=np.int32([0, -1]))
    assert compared(changed("query_boxes", (1, 0, 0), 3.0), batch=batch).pictures == 1


def test_proposals_may_come_in_another_order():
    """Only those of two-stage detectors, which have a lead; a token that rounding exchanges is counted."""
    order = [0, 2, 1, 3, 4]
    other = ANSWERS._replace(query_logits=ANSWERS.query_logits[:, order], query_boxes=ANSWERS.query_boxes[:, order])
    assert compared(other, lead=np.full(2, 0.1)).ties == 0
    with pytest.raises(UserError, match="query"):
        compared(other)
    exchanged = changed("query_boxes", (0, 4, 0), 2.0)
    with pytest.raises(UserError, match="query 4, cx"):
        compared(exchanged, lead=np.full(2, 0.1))
    assert compared(exchanged, lead=np.full(2, 1e-6)).ties == 1

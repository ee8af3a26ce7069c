"""Post-processing on numbers small enough to work out by hand."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.structures import Predictions


def classification(name):
    loss = base().loss
    loss.classification = name
    return build_classification(ConfigDict(loss))


def predictions(probabilities, boxes):
    """One image, two layers, of which the first must not matter. Softmax of log(p) is p, since each row adds to 1."""
    logits = np.log(np.float32(probabilities))[None, None]
    boxes = np.float32(boxes)[None, None]
    return Predictions(np.concatenate([logits * 0, logits]), np.concatenate([boxes * 0, boxes]))


def answered(predictions, size, name, most):
    """The `most` best detections in an image of this (height, width)."""
    program = functools.partial(postprocess, classification=classification(name), max_detections=most)
    return jax.jit(program)(predictions, np.int32([size]))


def test_softmax_takes_the_best_real_class_of_every_query():
    """No-object (the last) is removed after the softmax, so a query that prefers it still answers."""
    found = predictions(
        [[0.05, 0.15, 0.8], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]],
        [[0.5, 0.5, 1, 1], [0.25, 0.5, 0.1, 0.2], [0, 0, 0.5, 0.5]],
    )
    answer = answered(found, (100, 200), "softmax_no_object", 100)
    np.testing.assert_allclose(answer.scores, [[0.6, 0.3, 0.15]], rtol=1e-6)
    np.testing.assert_array_equal(answer.labels, [[0, 1, 1]])
    expected = [[40, 40, 60, 60], [-50, -25, 50, 25], [0, 0, 200, 100]]  # xyxy, not clipped
    np.testing.assert_allclose(answer.boxes[0], expected, rtol=1e-5, atol=1e-4)


def test_softmax_keeps_the_best_queries():
    found = predictions([[0.05, 0.15, 0.8], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], [[0.5, 0.5, 1, 1]] * 3)
    answer = answered(found, (10, 10), "softmax_no_object", 2)
    np.testing.assert_allclose(answer.scores, [[0.6, 0.3]], rtol=1e-6)


def test_sigmoid_takes_the_best_pairs_of_query_and_class():
    """sigmoid(log(p / (1 - p))) = p; the second query answers twice, the third not at all."""
    p = np.array([[0.1, 0.7], [0.9, 0.8], [0.2, 0.3]])
    found = predictions(p / (1 - p), [[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]])
    answer = answered(found, (40, 80), "sigmoid_focal", 3)
    np.testing.assert_allclose(answer.scores, [[0.9, 0.8, 0.7]], rtol=1e-5)
    np.testing.assert_array_equal(answer.labels, [[0, 1, 1]])
    np.testing.assert_allclose(answer.boxes[0], [[20, 10, 60, 30], [20, 10, 60, 30], [0, 0, 80, 40]], rtol=1e-5)


@pytest.mark.parametrize("name, most", [("softmax_no_object", 3), ("sigmoid_focal", 6)])
def test_asking_for_more_than_there_is(name, most):
    found = predictions([[0.2, 0.3, 0.5]] * 3 if name == "softmax_no_object" else [[0.2, 0.3]] * 3, [[0.5] * 4] * 3)
    answer = answered(found, (40, 80), name, 300)
    assert answer.scores.shape == (1, most) and answer.boxes.shape == (1, most, 4)

"""The readings of class logits against numbers worked out by hand and the published golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.losses.classification import SigmoidFocal, SigmoidIoUAware, SoftmaxNoObject, build_classification


class Compiled:
    """A classification whose methods are one program each, with NumPy around it: JAX takes longer for one operation
    after the other."""

    def __init__(self, classification):
        self.itself, self.check_width = classification, classification.check_width
        self.cost, self.loss, self.normalizer, self.scores = (
            in_numpy(getattr(classification, name)) for name in ("cost", "loss", "normalizer", "scores")
        )
        self.detect = in_numpy(classification.detect, static_argnames="k")
        self.value_and_gradient = in_numpy(jax.value_and_grad(lambda *arguments: classification.loss(*arguments)[0]))


def in_numpy(function, **how):
    compiled = jax.jit(function, **how)
    return lambda *arguments, **options: jax.device_get(compiled(*arguments, **options))


SOFTMAX = Compiled(SoftmaxNoObject(no_object_weight=0.1))
FOCAL = Compiled(SigmoidFocal(alpha=0.25, gamma=2.0))
IOU_AWARE = Compiled(SigmoidIoUAware(alpha=0.25, gamma=2.0))
BOTH = pytest.mark.parametrize("classification", [SOFTMAX, FOCAL], ids=["softmax", "focal"])


def test_build():
    config = base().loss
    assert build_classification(config) == SOFTMAX.itself
    config.classification = "sigmoid_focal"
    assert build_classification(config) == FOCAL.itself
    config.classification = "sigmoid_iou_aware"
    assert build_classification(config) == IOU_AWARE.itself != FOCAL.itself
    config.classification = "focal"
    with pytest.raises(UserError, match="'focal'; it can be softmax_no_object, sigmoid_focal or sigmoid_iou_aware"):
        build_classification(config)


def test_width_rules():
    SOFTMAX.check_width(92, 91)
    FOCAL.check_width(91, 91)
    FOCAL.check_width(92, 91)  # SMCA
    for classification, width in ((SOFTMAX, 91), (SOFTMAX, 93), (FOCAL, 90)):
        with pytest.raises(UserError, match="91 classes"):
            classification.check_width(width, 91)


def test_softmax_cost_is_minus_probability():
    logits = np.log(np.float32([[[[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]]]))
    cost = SOFTMAX.cost(logits, np.int32([[1, 0, 0]]))
    np.testing.assert_allclose(cost, [[[[-0.2, -0.1, -0.1], [-0.25, -0.5, -0.5]]]], rtol=1e-6)


def test_softmax_loss_golden():
    """One image, four queries, 92 logits, zero but one: 3.034974 with targets 3 and three times no object."""
    logits = np.zeros((1, 1, 4, 92), np.float32)
    logits[0, 0, 0, 3] = 2.0
    normalizer = SOFTMAX.normalizer(np.array([[True, False]]), 4)
    np.testing.assert_allclose(normalizer, 1.3, rtol=1e-6)
    loss = SOFTMAX.loss(logits, np.int32([[[3, -1, -1, -1]]]), normalizer)
    np.testing.assert_allclose(loss, [3.034974], atol=2e-6)


def test_softmax_loss_is_the_mean_of_its_weights_not_of_boxes():
    logits = np.zeros((2, 2, 2, 4), np.float32)  # every cross-entropy is log 4
    targets = np.int32([[[0, -1], [2, 1]], [[1, -1], [0, 0]]])
    box_valid = np.array([[True, False, False], [True, True, True]])  # the third box finds no query
    normalizer = SOFTMAX.normalizer(box_valid, 2)
    np.testing.assert_allclose(normalizer, 3.1, rtol=1e-6)
    np.testing.assert_allclose(SOFTMAX.loss(logits, targets, normalizer), np.log([4, 4]), rtol=1e-6)


def test_softmax_loss_where_nothing_weighs_anything_is_zero():
    weightless = Compiled(SoftmaxNoObject(no_object_weight=0.0))
    normalizer = weightless.normalizer(np.zeros((1, 3), bool), 2)
    np.testing.assert_array_equal(
        weightless.loss(np.ones((1, 1, 2, 4), np.float32), np.full((1, 1, 2), -1, np.int32), normalizer), [0.0]
    )


def test_focal_normalizer_is_the_number_of_boxes():
    assert FOCAL.normalizer(np.array([[True, False], [True, True]]), 1) == 3
    assert FOCAL.normalizer(np.zeros((2, 2), bool), 1) == 1


@pytest.mark.parametrize(
    ("logit", "cost"),
    [
        (0.0, 0.25 * 0.25 * np.log(2) - 0.75 * 0.25 * np.log(2)),  # -0.086643
        (np.log(3.0), 0.25 / 16 * np.log(4 / 3) - 0.75 * 9 / 16 * np.log(4)),  # p = 3/4
        (-np.log(3.0), 0.25 * 9 / 16 * np.log(4) - 0.75 / 16 * np.log(4 / 3)),  # p = 1/4
        (200.0, -0.75 * -np.log(1e-8)),  # saturated: bounded by the epsilon
        (-200.0, 0.25 * -np.log(1e-8)),
    ],
)
def test_focal_cost(logit, cost):
    logits = np.zeros((1, 1, 1, 5), np.float32)
    logits[..., 2] = logit
    np.testing.assert_allclose(FOCAL.cost(logits, np.int32([[2, 0]]))[0, 0, 0], [cost, -0.086643], atol=2e-6)


def test_focal_cost_does_not_follow_the_loss_settings():
    logits = np.float32([[[[0.3, -1.0]]]])
    labels = np.int32([[0, 1]])
    other = Compiled(SigmoidFocal(alpha=0.9, gamma=0.5))
    np.testing.assert_array_equal(other.cost(logits, labels), FOCAL.cost(logits, labels))


@pytest.mark.parametrize(
    ("logit", "target", "loss"),
    [
        (0.0, 0, 0.25 * 0.25 * np.log(2)),
        (0.0, -1, 0.75 * 0.25 * np.log(2)),
        (np.log(3.0), 0, 0.25 / 16 * np.log(4 / 3)),
        (np.log(3.0), -1, 0.75 * 9 / 16 * np.log(4)),
        (-np.log(3.0), 0, 0.25 * 9 / 16 * np.log(4)),
    ],
)
def test_focal_loss_of_one_logit(logit, target, loss):
    found = FOCAL.loss(np.full((1, 1, 1, 1), logit, np.float32), np.full((1, 1, 1), target, np.int32), np.float32(1))
    np.testing.assert_allclose(found, [loss], rtol=1e-6)


def test_focal_loss_sums_over_logits_and_divides_by_boxes():
    logits = np.zeros((2, 1, 3, 4), np.float32)
    targets = np.int32([[[0, -1, 3]], [[-1, -1, -1]]])
    present, absent = 0.25 * 0.25 * np.log(2), 0.75 * 0.25 * np.log(2)
    np.testing.assert_allclose(
        FOCAL.loss(logits, targets, np.float32(2)), [(2 * present + 10 * absent) / 2, 12 * absent / 2], rtol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_without_modulation_is_cross_entropy_and_stays_finite(gamma):
    focal = Compiled(SigmoidFocal(alpha=0.5, gamma=gamma))
    logits = np.float32([-1e4, -300.0, -90.0, 0.0, 90.0, 300.0, 1e4]).reshape(1, 1, 1, 7)
    value, gradient = focal.value_and_gradient(logits, np.int32([[[0]]]), np.float32(1))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if gamma == 0:
        cross_entropy = np.logaddexp(0, -np.where(np.arange(7) == 0, 1, -1) * np.float64(logits))
        np.testing.assert_allclose(value, 0.5 * cross_entropy.sum(), rtol=1e-6)


@BOTH
def test_extreme_logits_give_finite_losses_and_gradients(classification):
    logits = 1e4 * np.float32([[[[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]]]])
    targets = np.int32([[[1, -1]]])
    value, gradient = classification.value_and_gradient(logits, targets, np.float32(1))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.isfinite(classification.cost(logits, np.int32([[0, 1]]))).all()


@BOTH
def test_bfloat16_logits_are_computed_in_float32(classification):
    logits = np.random.default_rng(0).normal(size=(2, 2, 5, 7)).astype(jnp.bfloat16)
    targets, labels = np.int32([[[0, -1, 5, -1, 2]] * 2] * 2), np.int32([[0, 3], [5, 5]])
    wide = logits.astype(np.float32)
    for found, expected in (
        (classification.loss(logits, targets, np.float32(3)), classification.loss(wide, targets, np.float32(3))),
        (classification.cost(logits, labels), classification.cost(wide, labels)),
        (classification.scores(logits[0]), classification.scores(wide[0])),
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_softmax_detections_are_the_best_class_of_each_query():
    probability = np.float32([[[0.2, 0.1, 0.7], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]])  # the last column is no object
    scores, labels, query = SOFTMAX.detect(np.log(probability), k=2)
    np.testing.assert_allclose(scores, [[0.6, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(labels, [[1, 0]])
    np.testing.assert_array_equal(query, [[1, 2]])
    scores, _, query = SOFTMAX.detect(np.log(probability), k=100)
    np.testing.assert_allclose(scores, [[0.6, 0.3, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(SOFTMAX.scores(np.log(probability)), probability[..., :2], rtol=1e-6)


def test_focal_detections_are_the_best_pairs_of_query_and_class():
    probability = np.float32([[[0.9, 0.8, 0.1], [0.2, 0.7, 0.3]]])
    logits = np.log(probability / (1 - probability))
    scores, labels, query = FOCAL.detect(logits, k=4)
    np.testing.assert_allclose(scores, [[0.9, 0.8, 0.7, 0.3]], rtol=1e-5)
    np.testing.assert_array_equal(labels, [[0, 1, 1, 2]])
    np.testing.assert_array_equal(query, [[0, 0, 1, 1]])
    assert FOCAL.detect(logits, k=100)[0].shape == (1, 6)
    np.testing.assert_allclose(FOCAL.scores(logits), probability, rtol=1e-5)


# Of IA_BCE_loss in Align-DETR's released code (github.com/FelixCaae/AlignDETR), in float64, divided by 3.
OVERLAPS = [0.18 / 0.26, 0.5, 0.0, 0.0]
ALIGNED = [
    (
        IOU_AWARE,
        2.3506890964,
        [[0.005677035, 0.175383941, 0.048511008], [0.015769589, 0.000104957, 0.256078241]]
        + [[0.029036554, 0.099428932, 1.5e-08], [0.362131951, 0.036400974, 0.175383941]],
    ),
    (
        Compiled(SigmoidIoUAware(alpha=0.5, gamma=1.0)),
        2.6779397908,
        [[0.021106383, 0.205455775, 0.033303768], [0.010666312, 0.001481409, 0.264216522]]
        + [[0.062407854, 0.141095598, 4.073e-06], [0.345107495, 0.036400974, 0.205455775]],
    ),
]


@pytest.mark.parametrize(("classification", "value", "gradient"), ALIGNED)
def test_iou_aware_loss_is_the_official_one(classification, value, gradient):
    """Three of four queries have a class; the last one's box lies beside its target."""
    logits = np.float32([[-1.5, 0.5, 2.0], [0.25, -3.0, 1.0], [-0.75, 0.0, -6.0], [4.0, -2.0, 0.5]])[None, None]
    labels, overlap = np.int32([[[2, 0, -1, 1]]]), np.float32([[OVERLAPS]])

    def loss(logits, overlap):
        return classification.itself.loss(logits, labels, np.float32(3), overlap=overlap)[0]

    value_and_gradients = in_numpy(jax.value_and_grad(loss, argnums=(0, 1)))
    found, (by_logits, by_overlap) = value_and_gradients(logits, overlap)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(by_logits[0, 0], gradient, rtol=1e-5, atol=1e-9)
    assert not by_overlap.any()


def test_iou_aware_loss_leaves_out_what_is_not_counted_and_stays_finite():
    logits = 1e4 * np.float32([[[[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]]]])

    def loss(logits, counted):
        target = dict(overlap=np.float32([[[0.9, 0.0]]]), counted=counted)
        return IOU_AWARE.itself.loss(logits, np.int32([[[1, -1]]]), np.float32(1), **target)[0]

    value_and_gradient = in_numpy(jax.value_and_grad(loss))
    for counted in ([True, True], [True, False]):
        value, gradient = value_and_gradient(logits, np.array([counted]))
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert gradient[0, 0, 1].any() == counted[1]

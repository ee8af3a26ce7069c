"""Places of latents and queries, by hand."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import demo
from deperceiver_jax import UserError, build_detector
from deperceiver_jax.models.deperceiver.anchors import Anchors, GaussianBias
from deperceiver_jax.models.deperceiver_plus.latent_decoder import BoxGaussian
from deperceiver_jax.models.features.tokens import grid_points
from tests.drawn_arrays import answer_of, new_detector


def test_grid_points_are_even():
    np.testing.assert_allclose(grid_points(4), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    np.testing.assert_allclose(grid_points(3)[:, 0], [1 / 6, 3 / 6, 5 / 6], atol=1e-6)
    points = grid_points(50)  # rows of 8 and 7
    assert points.shape == (50, 2)
    assert len(np.unique(points, axis=0)) == 50
    np.testing.assert_allclose(points.mean(axis=0), [0.5, 0.5], atol=0.01)
    np.testing.assert_allclose(answer_of(Anchors(50)), points, atol=1e-6)


def test_gaussian_by_hand():
    bias = GaussianBias(2, 0.1)
    queries, keys = np.float32([[[0.5, 0.5]]]), np.float32([[[0.5, 0.5], [0.7, 0.5]], [[0.5, 0.1], [0.2, 0.1]]])
    out = answer_of(bias, queries, keys)
    assert out.shape == (2, 2, 1, 2)
    np.testing.assert_allclose(out[0, :, 0], [[0, -(0.2**2) / (2 * 0.1**2)], [0, -(0.2**2) / (2 * 0.4**2)]], rtol=1e-5)
    np.testing.assert_allclose(out[1, 0, 0], [-(0.4**2) / 0.02, -(0.3**2 + 0.4**2) / 0.02], rtol=1e-5)


def test_the_gaussian_is_around_the_box():
    gaussian = BoxGaussian(8, 2, least_width=0.1, rngs=nnx.Rngs(0))
    content = np.ones((1, 1, 8), np.float32)
    box = np.float32([[[0.5, 0.5, 0.4, 0.02]]])  # half 0.2 wide; its height counts as 0.1
    place = np.float32([[[0.5, 0.5], [0.7, 0.5], [0.5, 0.6], [0.3, 0.5]]])
    # Head 0 looks at the middle, head 1 to the right of it, at 0.66; both are half of a half wide.
    expected = [[0.0, -2.0, -2.0, -2.0], [-1.28, -0.08, -3.28, -6.48]]
    log_gaussian = jax.jit(lambda *arrays: gaussian(*arrays).map())
    np.testing.assert_allclose(np.asarray(log_gaussian(content, box, place))[0, :, 0], expected, atol=1e-5)


def test_boxes_start_at_their_anchors():
    config = demo.get_config("deperceiver")
    config.model.encoder.update(num_blocks=1, num_cross_attentions=1)  # fewer to compile
    detector = new_detector(config)
    graphdef, anchors, rest = nnx.split(detector, lambda path, _: path[:2] == ("decoder", "anchors"), ...)
    image = np.random.default_rng(0).standard_normal((1, 64, 64, 3), np.float32)

    def sixth(anchors):
        boxes = nnx.merge(graphdef, anchors, rest)(image, np.ones((1, 64, 64), bool)).boxes
        return boxes[-1, 0, 5, 0], boxes

    gradient, boxes = jax.device_get(jax.jit(jax.grad(sixth, has_aux=True))(anchors))
    np.testing.assert_allclose(boxes[-1, 0, :, :2], grid_points(config.model.num_queries), atol=0.2)
    # Anchors are learned, and the answer of a query follows its own one most.
    assert np.abs(gradient.decoder.anchors.logits[...]).argmax() // 2 == 5


def test_relative_boxes_need_anchors():
    config = demo.get_config("deperceiver")
    config.model.decoder.anchors = False
    with pytest.raises(UserError, match="relative_boxes needs config.model.decoder.anchors"):
        build_detector(config, rngs=nnx.Rngs(0))

"""Proposals of tokens, and the tokens of boxes, by hand."""

import jax
import numpy as np

from deperceiver_jax.models.features.position_encoding import sine_waves
from deperceiver_jax.models.features.pyramid import make_level_tokens
from deperceiver_jax.models.heads.heads import inverse_sigmoid
from deperceiver_jax.models.heads.proposals import token_boxes, tokens_of_boxes
from tests.drawn_arrays import level_tokens


def test_proposals_by_hand():

    @jax.jit
    def proposals(map_valid):
        boxes, valid = token_boxes(level_tokens(map_valid))
        return boxes, valid, inverse_sigmoid(boxes)

    boxes, valid, logits = jax.device_get(proposals([np.ones((1, 2, 3), bool), np.ones((1, 1, 2), bool)]))
    assert valid.all()
    np.testing.assert_allclose(boxes[0, 0], [1 / 6, 0.25, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(boxes[0, 3], [1 / 6, 0.75, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(boxes[0, 6:], [[0.25, 0.5, 0.1, 0.1], [0.75, 0.5, 0.1, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(logits[0, 0], [-1.609438, -1.098612, -2.944439, -2.944439], rtol=0, atol=2e-6)
    encoded = np.asarray(jax.jit(sine_waves, static_argnums=1)(np.full((1, 1, 4), 0.5, np.float32), 128))
    np.testing.assert_allclose(encoded[0, 0, :4], [0, -1, 0.408751, -0.912646], atol=1e-5)
    logits = jax.jit(inverse_sigmoid)(np.float32([-1.0, 0.5, 2.0]))
    np.testing.assert_allclose(logits, [-11.512925, 0, 11.512925], rtol=1e-5)


def test_a_box_starts_as_the_token_that_covers_it():
    map_valid = [np.zeros((1, 8, 12), bool), np.zeros((1, 4, 6), bool)]
    map_valid[0][:, :7, :9] = map_valid[1][:, :, :5] = True
    maps = [np.zeros((*valid.shape, 1), np.float32) for valid in map_valid]
    extent = np.float32([[[8.3, 6.6], [4.6, 3.7]]])  # last cells are partly image
    boxes = [[0.5, 0.5, 0.05, 0.05], [0.99, 0.99, 0.05, 0.05], [-0.2, 1.2, 0.04, 0.04]]
    boxes += [[0.1, 0.9, 0.2, 0.2], [0.9, 0.1, 0.8, 0.8]]  # the coarse level starts at a size of 0.1

    @jax.jit
    def tokens_and_places(boxes):
        tokens = make_level_tokens(maps, map_valid, extent)
        return tokens_of_boxes(boxes, tokens)[0], tokens.places[0]

    token, places = jax.device_get(tokens_and_places(np.float32([boxes])))
    row_and_column = [(3, 4), (6, 8), (6, 0)]
    assert token.tolist() == [12 * row + column for row, column in row_and_column] + [96 + 6 * 3, 96 + 4]
    for box, place in zip(boxes[:2], places[token[:2]], strict=True):
        assert np.all(np.abs(place - box[:2]) <= 0.5 / np.array([8.3, 6.6]) + 1e-6)

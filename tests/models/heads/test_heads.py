"""How the answers of a box head move reference boxes, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.models.heads.heads import BOX_DELTAS, move_boxes

REFERENCE = jnp.asarray([[[[0.5, 0.25, 0.2, 0.1], [0.9, 0.1, 0.04, 0.02]]]])
DELTAS = jnp.asarray([0.5, -1.0, np.log(2), 0.0], jnp.float32)


def test_scaled_deltas_are_in_units_of_the_reference():
    boxes = move_boxes(REFERENCE, DELTAS[None, None, None], "scaled")
    np.testing.assert_allclose(boxes[0, 0], [[0.6, 0.15, 0.4, 0.1], [0.92, 0.08, 0.08, 0.02]], rtol=1e-6)


def test_logit_deltas_are_added_to_the_logits():
    boxes = move_boxes(jnp.full((1, 1, 1, 4), 0.5), DELTAS[None, None, None], "logits")
    np.testing.assert_allclose(boxes[0, 0, 0], [0.622459, 0.268941, 2 / 3, 0.5], rtol=1e-5)


@pytest.mark.parametrize("box_deltas", BOX_DELTAS)
def test_no_delta_is_no_move(box_deltas):
    np.testing.assert_allclose(move_boxes(REFERENCE, jnp.zeros_like(REFERENCE), box_deltas), REFERENCE, rtol=1e-5)


def test_growth_is_bounded_and_shrinking_is_not():
    def side(growth):
        return move_boxes(jnp.full(4, 0.016), jnp.stack([0.0, 0.0, growth, growth]), "scaled")[2]

    assert side(100.0) == pytest.approx(1.0, rel=1e-5) and 0 < side(-20.0) < 1e-9
    assert jax.grad(side)(jnp.float32(100.0)) == 0 and jax.grad(side)(jnp.float32(1.0)) > 0

"""How the answers of a box head move reference boxes, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.models.heads.heads import BOX_DELTAS, move_boxes

REFERENCE = np.float32([[[[0.5, 0.25, 0.2, 0.1], [0.9, 0.1, 0.04, 0.02]]]])
DELTAS = np.float32([[[[0.5, -1.0, np.log(2), 0.0]]]])


def moved(*arguments):
    return np.asarray(jax.jit(move_boxes, static_argnums=2)(*arguments))


def test_scaled_deltas_are_in_units_of_the_reference():
    boxes = moved(REFERENCE, DELTAS, "scaled")
    np.testing.assert_allclose(boxes[0, 0], [[0.6, 0.15, 0.4, 0.1], [0.92, 0.08, 0.08, 0.02]], rtol=1e-6)


def test_logit_deltas_are_added_to_the_logits():
    boxes = moved(np.full((1, 1, 1, 4), 0.5, np.float32), DELTAS, "logits")
    np.testing.assert_allclose(boxes[0, 0, 0], [0.622459, 0.268941, 2 / 3, 0.5], rtol=1e-5)


@pytest.mark.parametrize("box_deltas", BOX_DELTAS)
def test_no_delta_is_no_move(box_deltas):
    np.testing.assert_allclose(moved(REFERENCE, np.zeros_like(REFERENCE), box_deltas), REFERENCE, rtol=1e-5)


def test_growth_is_bounded_and_shrinking_is_not():
    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def side(growth):
        return move_boxes(jnp.full(4, 0.016), jnp.stack([0.0, 0.0, growth, growth]), "scaled")[2]

    (grown, shrunk, _), slope = jax.device_get(side(np.float32([100.0, -20.0, 1.0])))
    assert grown == pytest.approx(1.0, rel=1e-5) and 0 < shrunk < 1e-9
    assert slope[0] == 0 and slope[2] > 0

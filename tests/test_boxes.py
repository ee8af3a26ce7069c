"""Box formats and overlaps against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.boxes import box_area, box_cxcywh_to_xyxy, box_iou, generalized_box_iou


@jax.jit
def overlaps(a, b):
    return box_iou(a, b), generalized_box_iou(a, b)


def test_corners_from_centre_and_size():
    cxcywh = np.float32([[0.5, 0.4, 0.2, 0.6], [10.0, 20.0, 4.0, 0.0]])
    corners = jax.jit(box_cxcywh_to_xyxy)(cxcywh)
    np.testing.assert_allclose(corners, [[0.4, 0.1, 0.6, 0.7], [8, 20, 12, 20]], atol=1e-6)


def test_any_leading_axes_and_dtype():
    corners = jax.eval_shape(box_cxcywh_to_xyxy, jax.ShapeDtypeStruct((2, 3, 1, 4), jnp.bfloat16))
    assert corners.shape == (2, 3, 1, 4)
    assert corners.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ((1, 1, 3, 3), 1 / 7, -0.079365),  # I 1, U 7, E 9
        ((4, 4, 5, 5), 0.0, -0.8),  # apart: I 0, U 5, E 25
        ((0, 0, 2, 2), 1.0, 1.0),
        ((0.5, 0.5, 1, 1), 0.25 / 4, 0.25 / 4),  # inside: E = U
        ((2, 0, 4, 2), 0.0, 0.0),  # side by side: E = U = 8
        ((1, 1, 1, 1), 0.0, 0.0),  # a point inside
    ],
)
def test_overlaps(other, iou, giou):
    box, other = np.float32([0.0, 0.0, 2.0, 2.0]), np.float32(other)
    for a, b in ((box, other), (other, box)):
        np.testing.assert_allclose(overlaps(a, b), (iou, giou), atol=1e-6)


def test_all_pairs_by_broadcasting():
    a = np.float32([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = np.float32([[1.0, 1.0, 3.0, 3.0], [4.0, 4.0, 5.0, 5.0], [0.0, 0.0, 2.0, 2.0]])
    _, pairs = overlaps(a[:, None], b[None, :])
    np.testing.assert_allclose(pairs, [[-0.079365, -0.8, 1.0], [-4 / 9, -0.92, 0.25]], atol=1e-6)
    np.testing.assert_allclose(jax.jit(box_area)(b), [4, 1, 4])


def test_two_points_are_nan_as_in_detr():
    point = np.float32([1.0, 1.0, 1.0, 1.0])
    assert np.isnan(overlaps(point, point)).all()

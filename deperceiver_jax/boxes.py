"""Box formats and overlaps. Every function works on any leading axes and keeps the dtype of its input."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def box_cxcywh_to_xyxy(boxes: Float[Array, "*axes 4"]) -> Float[Array, "*axes 4"]:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), in the same unit and frame."""
    center, size = jnp.split(boxes, 2, axis=-1)
    return jnp.concatenate([center - size / 2, center + size / 2], axis=-1)


def box_area(boxes: Float[Array, "*axes 4"]) -> Float[Array, "*axes"]:
    """Area of xyxy boxes."""
    low, high = _corners(boxes)
    return _product(high - low)


def _corners(boxes):
    """[..., 4] -> left and top [..., 2], right and bottom [..., 2]."""
    return jnp.split(boxes, 2, axis=-1)


def _product(sides):
    """[..., 2] -> [...]"""
    width, height = jnp.split(sides, 2, axis=-1)
    return (width * height)[..., 0]


def _intersection_and_union(a, b):
    (a_low, a_high), (b_low, b_high) = _corners(a), _corners(b)
    intersection = _product(jnp.maximum(jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low), 0.0))
    return intersection, box_area(a) + box_area(b) - intersection


def box_iou(a: Float[Array, "*axes 4"], b: Float[Array, "*axes 4"]) -> Float[Array, "*axes"]:
    """Intersection over union of xyxy boxes, paired by broadcasting. Two empty boxes give NaN, as in DETR."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / union


def generalized_box_iou(a: Float[Array, "*axes 4"], b: Float[Array, "*axes 4"]) -> Float[Array, "*axes"]:
    """Generalised IoU (arXiv:1902.09630) of xyxy boxes, paired by broadcasting; in [-1, 1].

    GIoU = I/U - (E - U)/E with E the area of the smallest enclosing box; no epsilon anywhere, so two boxes of zero
    area at one point give NaN (0/0), as in DETR. For all pairs, pass `a[:, None]` and `b[None, :]`.
    """
    intersection, union = _intersection_and_union(a, b)
    (a_low, a_high), (b_low, b_high) = _corners(a), _corners(b)
    enclosing = _product(jnp.maximum(a_high, b_high) - jnp.minimum(a_low, b_low))
    return intersection / union - (enclosing - union) / enclosing

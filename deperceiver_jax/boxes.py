"""Box formats and overlaps. Every function works on any leading axes and keeps the dtype of its input."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def box_cxcywh_to_xyxy(boxes: Float[Array, "*axes 4"]) -> Float[Array, "*axes 4"]:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), in the same unit and frame."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([center - size / 2, center + size / 2], axis=-1)


def box_area(boxes: Float[Array, "*axes 4"]) -> Float[Array, "*axes"]:
    """Area of xyxy boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_and_union(a, b):
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    sides = jnp.maximum(high - low, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
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
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    enclosing = (high[..., 0] - low[..., 0]) * (high[..., 1] - low[..., 1])
    return intersection / union - (enclosing - union) / enclosing

"""The detections of several views of a picture, as one picture's."""

from typing import Any

import cv2
import numpy as np

from deperceiver_jax.data.batches.views import Views, to_picture
from deperceiver_jax.structures import Detections


def merge_views(views: Views, detections: Detections, *, max_detections: int, iou: float) -> Detections:
    """[V, K] detections of views, scaled as if each view were its picture -> [N, max_detections] of the pictures.

    A box gives way to one of its class with a higher score that overlaps it by more than `iou`; what stays is the mean
    of those that overlap it so, weighted by their scores. One that the edge of its tile cuts is left out. Best score
    first; where a picture has fewer, scores are -1.
    Source: weighted means after suppression are the box voting of Gidaris and Komodakis, arXiv:1505.01749, section 4.
    """
    boxes, cut = to_picture(np.asarray(detections.boxes), views.geometry)
    scores, labels = np.asarray(detections.scores), np.asarray(detections.labels)
    count = int(views.example[-1]) + 1
    merged = Detections(
        np.full((count, max_detections), -1, scores.dtype),
        np.zeros((count, max_detections), labels.dtype),
        np.zeros((count, max_detections, 4), boxes.dtype),
    )
    bounds = np.searchsorted(views.example, np.arange(count + 1))
    for picture, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        whole = ~cut[first:last]
        columns = (scores[first:last][whole], labels[first:last][whole], boxes[first:last][whole])
        kept = suppress(*columns, iou=iou)[:max_detections]
        for into, column in zip(merged, columns, strict=True):
            into[picture, : len(kept)] = column[kept]
        merged.boxes[picture, : len(kept)] = weighted_means(*columns, kept, iou=iou)
    return merged


def suppress(scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, *, iou: float) -> np.ndarray:
    """Positions of what is left of [M] detections in pixels (xyxy), best score first. OpenCV does it."""
    if not len(scores):
        return np.zeros(0, int)
    corners = boxes.astype(np.float64)
    corners[:, 2:] -= corners[:, :2]  # left, top, width, height
    suppressed: Any = cv2.dnn.NMSBoxesBatched  # whose types ask for lists, though arrays are what is fast
    kept = np.array(suppressed(corners, scores.astype(np.float32), labels.astype(np.int32), -2.0, iou)).astype(int)
    return kept[np.argsort(-scores[kept], kind="stable")]


def weighted_means(
    scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, kept: np.ndarray, *, iou: float
) -> np.ndarray:
    """[kept, 4]: of each kept box, the mean of those of its class that overlap it by more than `iou`, and itself."""
    low = np.maximum(boxes[kept, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[kept, None, 2:], boxes[None, :, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    area = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1)
    overlapping = common > iou * (area[kept, None] + area - common)
    weight = np.where(overlapping & (labels[kept, None] == labels), scores, 0)
    weight[np.arange(len(kept)), kept] += 1e-6  # so that a box of score 0 stays what it is
    return weight @ boxes / weight.sum(-1, keepdims=True)

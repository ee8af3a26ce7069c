"""The answers of every decoder layer, from one forward pass, with and without non-maximum suppression.

Source: DETR (arXiv:2005.12872), section 4.2 and figure 4.
"""

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from deperceiver_jax.evaluation.evaluate import count_detections
from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.structures import Detections, Predictions

SUPPRESSED = -1  # a class slot that no data set has, so no metric counts it


def detections_of_layers(predictions: Predictions, original_size: Int32[Array, "B 2"], **options) -> Detections:
    """`postprocess` of each layer as if it were the last: scores and labels [B L K], boxes [B L K 4]."""
    layers = [
        postprocess(Predictions(logits[None], boxes[None]), original_size, **options)
        for logits, boxes in zip(predictions.logits, predictions.boxes, strict=True)
    ]
    return Detections(*(jnp.stack(parts, axis=1) for parts in zip(*layers, strict=True)))


def suppress_overlaps(detections: Detections, iou: float) -> Detections:
    """Non-maximum suppression within each class of an image: of two boxes that overlap by more than `iou`, the one
    with the lower score gets the label SUPPRESSED."""
    corners = np.asarray(detections.boxes, np.float64)
    low = corners[..., :2] - corners.min(initial=0)  # OpenCV keeps classes apart by where their boxes end
    boxes = np.concatenate([low, corners[..., 2:] - corners[..., :2]], axis=-1)
    labels = np.full_like(detections.labels, SUPPRESSED)
    for image, (box, score, label) in enumerate(zip(boxes, detections.scores, detections.labels, strict=True)):
        kept = cv2.dnn.NMSBoxesBatched(box, score, label, 0.0, iou)
        labels[image, kept] = label[kept]
    return detections._replace(labels=labels)


def layer_metrics(detections: Detections, source, config: ConfigDict, iou: float) -> list[tuple[dict, dict]]:
    """Of each layer, `coco_metric` of its detections, and of those that suppression at `iou` leaves."""
    found = []
    for layer in range(detections.scores.shape[1]):
        alone = Detections(*(part[:, layer] for part in detections))
        suppressed = suppress_overlaps(alone, iou)
        found.append((count_detections(alone, source, config)[0], count_detections(suppressed, source, config)[0]))
    return found

"""From a detector's answer to boxes a person can draw: the last layer, scored, in pixels of the image on disk."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from deperceiver_jax.boxes import box_cxcywh_to_xyxy
from deperceiver_jax.structures import Detections, Predictions


def postprocess(
    predictions: Predictions, original_size: Int32[Array, "B 2"], *, classification, max_detections: int
) -> Detections:
    """The best `max_detections` boxes of each image, best score first. No threshold, no overlap test, no clipping.

    original_size: (height, width) of each image as stored on disk, the frame of the answer.
    classification: says what the logits mean. Softmax: each query's best real class, even where no-object is likelier,
      so there are at most as many boxes as queries. Sigmoid: the best pairs of query and class, so a query may answer
      several times. Where there are fewer than `max_detections`, all of them are returned.
    Source: DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159), post-processing.
    """
    scores, labels, query = classification.detect(predictions.logits[-1], max_detections)
    boxes = box_cxcywh_to_xyxy(predictions.boxes[-1].astype(jnp.float32))
    height, width = original_size[:, 0], original_size[:, 1]
    scale = jnp.stack([width, height, width, height], axis=-1).astype(jnp.float32)
    boxes = jnp.take_along_axis(boxes, query[..., None], axis=1) * scale[:, None]
    return Detections(scores, labels, boxes)

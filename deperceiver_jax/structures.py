"""The arrays that travel between rooms: their axes, units, frames and mask sense.

B images in a batch, H x W padded pixels, N box slots of an image, R noisy copies of these, Q queries, L decoder
layers, C logits, K detections.
Sizes are (height, width). Masks are True where something real stands. All of them are plain tuples of arrays, so they
are JAX pytrees without importing JAX: the data workers, which never touch an accelerator, use them too.
"""

from typing import Any as Array  # NumPy's on the host, JAX's on the devices
from typing import NamedTuple

from jaxtyping import Bool, Float, Int32, UInt8


class Batch(NamedTuple):
    """Images of one size bucket and their targets, as the loader makes them on the host.

    Every image lies at the top left of its padded frame. Boxes are cxcywh in [0, 1] of the unpadded image.
    """

    image: UInt8[Array, "B H W 3"]  # RGB; zeros on padding
    size: Int32[Array, "B 2"]  # (height, width) of the real pixels inside the padded frame
    original_size: Int32[Array, "B 2"]  # (height, width) of the image as stored on disk
    example: Int32[Array, " B"]  # position in the split; -1 for an image that only fills up a ragged last batch
    boxes: Float[Array, "B N 4"]  # cxcywh in [0, 1] of the unpadded image; zeros where box_valid is False
    labels: Int32[Array, "B N"]  # class slot (see data/classes.py); 0 where box_valid is False
    box_valid: Bool[Array, "B N"]  # valid boxes come first

    @property
    def targets(self) -> "Targets":
        return Targets(self.boxes, self.labels, self.box_valid)


class Targets(NamedTuple):
    """What is in the images of a batch: the part of it that a detector in training may look at."""

    boxes: Float[Array, "B N 4"]
    labels: Int32[Array, "B N"]
    box_valid: Bool[Array, "B N"]


class Predictions(NamedTuple):
    """What a detector answers: one set of boxes from every decoder layer; the last layer is the answer."""

    logits: Float[Array, "L B Q C"]
    boxes: Float[Array, "L B Q 4"]  # cxcywh, in shares of the unpadded image
    proposals: "Predictions | None" = None  # of a two-stage detector: L = 1, Q = tokens, logit 0 for any object
    denoising: "Predictions | None" = None  # of denoising queries in training: Q = R N, copy after copy of all slots


class Assignment(NamedTuple):
    """Which query answers for which box, one to one, in every decoder layer."""

    query: Int32[Array, "L B N"]  # the query of each box slot; 0 where `matched` is False
    matched: Bool[Array, "L B N"]  # False for empty slots and for boxes beyond the number of queries


class Detections(NamedTuple):
    """Final boxes of each image, best score first."""

    scores: Float[Array, "B K"]  # in [0, 1]
    labels: Int32[Array, "B K"]  # class slot
    boxes: Float[Array, "B K 4"]  # xyxy in pixels of the original image, not clipped to it

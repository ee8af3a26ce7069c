"""What an exported file computes: pictures in, detections out, with everything between them inside."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8
from ml_collections import ConfigDict

from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.models import abstract_detector
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.structures import Predictions

INPUTS = ("image", "size", "original_size")
COARSEST = 32  # stride of a ResNet's last features


class Answers(NamedTuple):
    """The results of a file, in this order and under these names."""

    boxes: Float[Array, "B K 4"]  # xyxy in pixels of the original pictures, not clipped to them; best score first
    scores: Float[Array, "B K"]
    labels: Int32[Array, "B K"]  # class slots
    query_logits: Float[Array, "B Q C"]  # of the last decoder layer, which the three above are made from
    query_boxes: Float[Array, "B Q 4"]  # cxcywh in [0, 1] of the pictures without padding


class Sizes(NamedTuple):
    """What a file takes: so many pictures at one time, in a frame of so many pixels. None is any number.

    Both sides of a free frame are a multiple of `multiple`, so that the cells of every map fit into it, and at least
    `least` times that.
    """

    batch: int | None
    frame: tuple[int, int] | None  # (height, width)
    multiple: int
    least: int

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of the INPUTS, with the symbols batch, h and w for what is free: height = multiple * h."""
        constraints = [f"{side} >= {self.least}" for side in "hw"]
        batch, h, w = jax.export.symbolic_shape("batch,h,w", constraints=constraints)
        batch = self.batch or batch
        frame = self.frame or (self.multiple * h, self.multiple * w)
        pair = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
        return [jax.ShapeDtypeStruct((batch, *frame, 3), jnp.uint8), pair, pair]


def sizes_of(loaded: LoadedDetector, batch: int | None, frame: tuple[int, int] | None) -> Sizes:
    """Sizes with what a detector asks of free frames."""
    detector = abstract_detector(loaded.config)
    multiple = max(COARSEST, *detector.token_strides)
    cells = sum((multiple // stride) ** 2 for stride in detector.token_strides)
    return Sizes(batch, frame, multiple, least=math.isqrt(-(-detector.fewest_tokens // cells) - 1) + 1)


def file_program(loaded: LoadedDetector, precision: str) -> Callable[..., Answers]:
    """program(image, size, original_size) of the portable detector (models/layers/compute.py), parameters inside.

    precision: float32, float16 or bfloat16, of its activations and matrix products.

    image uint8 [B, H, W, 3]: RGB, each picture at the top left of its frame. size int32 [B, 2]: (height, width) of its
    pixels there; original_size int32 [B, 2]: of the picture that it was resized from.
    """
    config = loaded.config.copy_and_resolve_references()
    config.precision = precision
    skeleton, _, _ = take_apart(abstract_detector(config, portable=True))
    answer = _answer_of(loaded.config)

    def program(image: UInt8[Array, "B H W 3"], size: Int32[Array, "B 2"], original_size: Int32[Array, "B 2"]):
        return answer(skeleton.merge(loaded.arrays)(*normalize_images(image, size)), original_size)

    return program


def reference_program(loaded: LoadedDetector) -> Callable[..., tuple[Answers, Float[Array, " B"] | None]]:
    """The same by JAX, as eval.py computes it, for comparison: (answers, lead of the last chosen proposal).

    The lead is that of a two-stage detector's last chosen token before the first that is left out, in logits: where it
    is tiny, rounding decides which token becomes a query. None for other detectors.
    """
    answer = _answer_of(loaded.config)
    chosen = loaded.config.model.num_queries

    def program(arrays, image, size, original_size):
        predictions = loaded.skeleton.merge(arrays)(*normalize_images(image, size))
        lead = None
        if predictions.proposals is not None:
            scores = predictions.proposals.logits[0, ..., 0]
            best, _ = jax.lax.top_k(scores, min(chosen + 1, scores.shape[1]))
            lead = best[:, -2] - best[:, -1] if best.shape[1] > chosen else jnp.full(len(best), jnp.inf)
        return answer(predictions, original_size), lead

    compiled = jax.jit(program)
    arrays = jax.device_put(loaded.arrays)
    return lambda *inputs: jax.device_get(compiled(arrays, *inputs))


def _answer_of(config: ConfigDict) -> Callable[[Predictions, Any], Answers]:
    classification = build_classification(config.loss)

    def answer(predictions, original_size):
        classification.check_width(predictions.logits.shape[-1], config.model.num_classes)
        how: dict = dict(classification=classification, max_detections=config.eval.max_detections)
        detections = postprocess(predictions, original_size, **how)
        boxes, scores, labels = detections.boxes, detections.scores, detections.labels
        return Answers(boxes, scores, labels, predictions.logits[-1].astype(jnp.float32), predictions.boxes[-1])

    return answer

"""Pictures of many sizes on which a file and JAX are compared: drawn ones, and those of a split."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import evaluation_geometry
from deperceiver_jax.data.batches.loader import load_batch
from deperceiver_jax.data.batches.plan import evaluation_buckets, evaluation_plan
from deperceiver_jax.data.datasets.source import Source
from deperceiver_jax.export.program import Sizes
from deperceiver_jax.structures import Batch

SHARES = ((1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.3, 0.4))  # of a frame's height and width that drawn pictures take
ENLARGED = 1.5  # of the original pictures against those in the frame


def drawn_batches(sizes: Sizes, config: ConfigDict) -> Iterator[Batch]:
    """Coloured squares and noise, in a square and in a wide frame of the size that pictures are evaluated at."""
    side = max(config.data.eval_scale, sizes.least * sizes.multiple)
    frames = (
        [sizes.frame] if sizes.frame else [_rounded_up(f, sizes.multiple) for f in ((side, side), (side, 1.5 * side))]
    )
    rng = np.random.default_rng(0)
    for frame in frames:
        extents = np.maximum(1, np.array([np.multiply(frame, share) for share in SHARES])).astype(np.int32)
        for rows in _in_batches(np.arange(len(extents)), sizes.batch or 2):
            image = np.zeros((len(rows), *frame, 3), np.uint8)
            for row, extent in enumerate(extents[rows]):
                height, width = extent
                squares = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
                noise = rng.integers(-20, 21, (height, width, 3))
                image[row, :height, :width] = np.clip(squares[:height, :width] + noise, 0, 255)
            yield _batch(image, extents[rows], rows)


def split_batches(source: Source, count: int, sizes: Sizes, config: ConfigDict) -> Iterator[Batch]:
    """The first `count` pictures of a split, each once, resized as eval.py does, and further where a frame is smaller.

    Frames of a free size are the buckets of evaluation.
    """
    originals = source.sizes[:count]
    geometry = evaluation_geometry(originals, config.data)
    if sizes.frame:
        shrink = np.minimum(1, np.min(np.array(sizes.frame) / geometry.size, axis=1, keepdims=True))
        fitted = np.maximum(1, np.floor(geometry.size * shrink + 1e-6)).astype(np.int32)
        geometry, buckets = dataclasses.replace(geometry, size=fitted), np.array([sizes.frame], np.int32)
    else:
        buckets = evaluation_buckets(originals, config.data)
        buckets = np.unique(np.maximum(-(-buckets // sizes.multiple), sizes.least) * sizes.multiple, axis=0)
        buckets = buckets[np.argsort(buckets.prod(1), kind="stable")]
    plan = evaluation_plan(geometry.size, buckets, sizes.batch or min(2, count))
    for bucket, examples in zip(plan.bucket, plan.example, strict=True):
        rows = slice(0, len(examples))
        yield load_batch(source, geometry, examples, rows, buckets[bucket], max(source.max_boxes, 1), _empty)


def _empty(shape) -> np.ndarray:
    return np.empty(shape, np.uint8)


def _rounded_up(frame, multiple: int) -> tuple[int, int]:
    height, width = (int(-(-side // multiple) * multiple) for side in frame)
    return height, width


def _in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """All of `rows`; some twice where a batch would not be full."""
    count = -(-len(rows) // size)
    return list(np.resize(rows, count * size).reshape(count, size))


def _batch(image, extents, rows) -> Batch:
    no_boxes = np.zeros((len(rows), 1), np.int32)
    original = np.round(extents * ENLARGED).astype(np.int32)
    return Batch(image, extents, original, rows.astype(np.int32), np.zeros((len(rows), 1, 4)), no_boxes, no_boxes > 0)

"""Batches that look like COCO's to a training step: sizes of images, padding, numbers of boxes; the pixels are noise.

They are kept in files, so that every program that is timed gets the same ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from benchmarks.box_counts import coco_box_counts
from benchmarks.input_pipeline import coco_sizes
from deperceiver_jax.data.batches.geometry import training_geometry
from deperceiver_jax.data.batches.plan import GRID, training_buckets, training_plan
from deperceiver_jax.structures import Batch

SLOTS = 100  # box slots of each image, enough for the fullest of COCO
CLASS_SLOTS = 91  # COCO's; 0 is none of its classes
EPOCH_IMAGES = 20_000  # of the epoch whose first batches are taken


def fixed_batches(size: tuple[int, int], batch_size: int, count: int) -> list[Batch]:
    """`count` batches whose images all have one size (height, width), padded to the grid of the buckets."""
    frame = np.array([-(-side // GRID) * GRID for side in size])
    return _batches([(np.broadcast_to(size, (batch_size, 2)), frame)] * count)


def planned_batches(config: ConfigDict, batch_size: int, count: int) -> list[Batch]:
    """The first `count` batches of a planned epoch of images of COCO's sizes. `config` is config.data."""
    sample = coco_sizes()
    sizes = sample[np.random.default_rng(0).integers(0, len(sample), EPOCH_IMAGES)]
    outputs = training_geometry(sizes, 0, 0, config).size
    buckets = training_buckets(sample, config)
    plan = training_plan(outputs, buckets, 0, 0, batch_size)
    return _batches([(outputs[plan.example[step]], buckets[plan.bucket[step]]) for step in range(count)])


def _batches(shapes: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Batch]:
    """Batches of these (sizes [B, 2] of their images, frame [2])."""
    rng = np.random.default_rng(0)
    batch_size = len(shapes[0][0])
    counts = rng.permutation(coco_box_counts(len(shapes) * batch_size, SLOTS)).reshape(-1, batch_size)
    return [_batch(rng, sizes, frame, count) for (sizes, frame), count in zip(shapes, counts, strict=True)]


def _batch(rng: np.random.Generator, sizes: np.ndarray, frame: np.ndarray, counts: np.ndarray) -> Batch:
    height, width = frame.tolist()
    image = rng.integers(0, 256, (len(sizes), height, width, 3), np.uint8)
    for picture, (bottom, right) in zip(image, sizes, strict=True):
        picture[bottom:], picture[:, right:] = 0, 0
    box_valid = np.arange(SLOTS)[None] < counts[:, None]
    side = 0.02 + 0.6 * rng.beta(1, 3, (len(sizes), SLOTS, 2))
    boxes = np.concatenate([rng.uniform(side / 2, 1 - side / 2), side], axis=-1)
    labels = rng.integers(1, CLASS_SLOTS, (len(sizes), SLOTS))
    size = np.array(sizes, np.int32)
    return Batch(
        image=image,
        size=size,
        original_size=size,
        example=np.arange(len(sizes), dtype=np.int32),
        boxes=np.where(box_valid[..., None], boxes, 0).astype(np.float32),
        labels=np.where(box_valid, labels, 0).astype(np.int32),
        box_valid=box_valid,
    )


def useful_share(batches: Sequence[Batch]) -> float:
    """Share of the pixels that are image, not padding."""
    useful = sum(int(batch.size.prod(1, dtype=np.int64).sum()) for batch in batches)
    return useful / sum(batch.image[..., 0].size for batch in batches)


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """One .npz file: field f of batch i is called "i/f"."""
    arrays = [{f"{i}/{field}": array for field, array in batch._asdict().items()} for i, batch in enumerate(batches)]
    np.savez(path, **{name: array for batch in arrays for name, array in batch.items()})


def read_batches(path: Path) -> list[Batch]:
    with np.load(path) as file:
        count = len(file.files) // len(Batch._fields)
        return [Batch(**{field: file[f"{i}/{field}"] for field in Batch._fields}) for i in range(count)]

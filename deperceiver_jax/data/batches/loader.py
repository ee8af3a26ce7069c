"""Batches for training and evaluation: the plan's images, loaded by Grain's workers.

A step's batch depends on the step number alone, whatever the number of workers, so that number is the whole position of
the data. Workers make NumPy arrays and never touch an accelerator; pixels stay uint8 until they are on the device.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import (
    Geometry,
    check_augmentation,
    evaluation_geometry,
    training_geometry,
    transform_boxes,
)
from deperceiver_jax.data.batches.pasting import GROUP, Member, Pasted, Piece, check_pasting, draw_pasted
from deperceiver_jax.data.batches.pixels import decode_image, paste_window, place_image
from deperceiver_jax.data.batches.plan import (
    Plan,
    choose_buckets,
    evaluation_buckets,
    evaluation_plan,
    host_rows,
    training_buckets,
    training_plan,
)
from deperceiver_jax.data.batches.views import Views
from deperceiver_jax.data.batches.workers import Empty, Stream
from deperceiver_jax.data.image_header import CorruptImage
from deperceiver_jax.errors import UserError
from deperceiver_jax.structures import Batch

DrawPasted = Callable[[Sequence[Member], int, int], Pasted]  # of (a group, which of it, its example)


class Images(Protocol):
    """What the loader needs of a data set's split; data/datasets/source.py has the real one."""

    @property
    def sizes(self) -> Int32[np.ndarray, "N 2"]: ...  # (height, width) of the images, turned by `orientation`
    @property
    def max_boxes(self) -> int: ...
    def __len__(self) -> int: ...
    def filename(self, position: int) -> str: ...
    def image_bytes(self, position: int) -> bytes: ...
    def orientation(self, position: int) -> int: ...  # EXIF's, which the stored image is turned by; 1: not at all
    def targets(self, position: int) -> tuple[Float32[np.ndarray, "K 4"], Int32[np.ndarray, " K"]]: ...


class TrainBatches:
    """Endless host-local batches, beginning with the one of `start_step`.

    `config` is config.data; its batch_size counts over all hosts, and process `process_index` of `process_count` gets
    its share of every batch. buckets: the padded sizes (height, width) that occur; box_slots: of every image.
    """

    def __init__(
        self,
        source: Images,
        config: ConfigDict,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ):
        check_augmentation(config)
        check_pasting(config)
        rows = host_rows(config.batch_size, process_index, process_count, "config.data.batch_size")
        if len(source) < config.batch_size:
            raise UserError(
                f"The training split has {len(source)} images, fewer than one batch of {config.batch_size} "
                "(config.data.batch_size)."
            )
        if source.max_boxes == 0:
            place = f"{config.directory or config.name}, split {config.train_split}"
            raise UserError(
                f"None of the {len(source)} images in {place}, has a box to learn; an annotation with iscrowd=1, and a "
                "box that is empty inside its image, is none."
            )
        if seed < 0 or config.buckets < 1:
            raise UserError(f"config.seed is {seed} and config.data.buckets {config.buckets}; 0 and 1 are the least.")
        buckets = training_buckets(source.sizes, config)
        self.box_slots = _box_slots(source, config)
        self._make = _TrainingStep(source, config, buckets, seed, rows, self.box_slots)
        self._steps = range(start_step, sys.maxsize)
        self._num_workers = config.num_workers
        self._image_bytes = _image_bytes(buckets, rows)
        self.steps_per_epoch = len(source) // config.batch_size
        self.buckets = [(int(height), int(width)) for height, width in buckets]

    def __iter__(self) -> Stream:
        return Stream(self._make, self._steps, self._num_workers, self._image_bytes)


class EvaluationBatches:
    """Every image of a split once, in host-local batches of one bucket each; a ragged last one is filled up.

    An image that only fills up is black, as large as its frame, and its `example` is -1. `batch_size` counts over all
    hosts, of which each gets its share of every batch. views: what is loaded in place of the images; `example` is a
    view's number, then.
    """

    def __init__(
        self,
        source: Images,
        config: ConfigDict,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        views: Views | None = None,
    ):
        check_augmentation(config)
        rows = host_rows(batch_size, process_index, process_count, "config.eval.batch_size")
        if views is None:
            buckets, geometry = evaluation_buckets(source.sizes, config), evaluation_geometry(source.sizes, config)
        else:
            source, geometry = _Viewed(source, views), views.geometry
            buckets = choose_buckets(geometry.size, geometry.size, config.eval_buckets)
        plan = evaluation_plan(geometry.size, buckets, batch_size)
        self._make = _EvaluationStep(source, plan, geometry, buckets, rows, max(source.max_boxes, 1))
        self._num_workers = config.num_workers
        self._image_bytes = _image_bytes(buckets, rows)
        self.num_batches = len(plan.bucket)
        self.buckets = [(int(height), int(width)) for height, width in buckets]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Stream:
        return Stream(self._make, range(self.num_batches), self._num_workers, self._image_bytes)


class _Viewed:
    """A split whose images are views of another's."""

    def __init__(self, source: Images, views: Views):
        self._source, self._example = source, views.example
        self._last: tuple[int, np.ndarray] | None = None  # the picture that was decoded last, which has more views
        self.sizes, self.max_boxes = source.sizes[views.example], source.max_boxes

    def __len__(self) -> int:
        return len(self._example)

    def filename(self, position: int) -> str:
        return self._source.filename(self._example[position])

    def image_bytes(self, position: int) -> bytes:
        return self._source.image_bytes(self._example[position])

    def orientation(self, position: int) -> int:
        return self._source.orientation(self._example[position])

    def targets(self, position: int) -> tuple[Float32[np.ndarray, "K 4"], Int32[np.ndarray, " K"]]:
        return self._source.targets(self._example[position])

    def decode(self, position: int) -> UInt8[np.ndarray, "h w 3"]:
        example, last = self._example[position], self._last
        if last is None or last[0] != example:
            self._last = last = example, _decode(self._source, example)
        return last[1]


class _TrainingStep:
    """step -> this host's share of its batch. Plans the step's epoch when it first meets it, in every worker alike."""

    def __init__(self, source: Images, config: ConfigDict, buckets: np.ndarray, seed: int, rows: slice, box_slots: int):
        self._source, self._config, self._buckets = source, config, buckets
        self._seed, self._rows, self._box_slots = seed, rows, box_slots
        self._epochs: dict[int, tuple[Plan, Geometry]] = {}

    def __call__(self, step: int, empty: Empty) -> Batch:
        epoch, position = divmod(step, len(self._source) // self._config.batch_size)
        plan, geometry = self._epoch(epoch)
        frame = self._buckets[plan.bucket[position]]
        examples, config = plan.example[position], self._config

        def pasted(members, own, example):
            room = self._box_slots - len(members[own].boxes)
            return draw_pasted(members, own, room, config, (self._seed, epoch, example))

        how = pasted if config.paste_objects else None
        return load_batch(self._source, geometry, examples, self._rows, frame, self._box_slots, empty, how)

    def _epoch(self, epoch):
        planned = self._epochs
        if epoch not in planned:
            geometry = training_geometry(self._source.sizes, self._seed, epoch, self._config)
            plan = training_plan(geometry.size, self._buckets, self._seed, epoch, self._config.batch_size)
            # Threads share this object; one of them may still be in the epoch before.
            planned = {known: planned[known] for known in planned if known == epoch - 1} | {epoch: (plan, geometry)}
            self._epochs = planned
        return planned[epoch]


class _EvaluationStep:
    """Number of a batch -> this host's share of it."""

    def __init__(
        self, source: Images, plan: Plan, geometry: Geometry, buckets: np.ndarray, rows: slice, box_slots: int
    ):
        self._source, self._plan, self._geometry, self._buckets = source, plan, geometry, buckets
        self._rows, self._box_slots = rows, box_slots

    def __call__(self, step: int, empty: Empty) -> Batch:
        frame = self._buckets[self._plan.bucket[step]]
        examples = self._plan.example[step]
        return load_batch(self._source, self._geometry, examples, self._rows, frame, self._box_slots, empty)


def load_batch(
    source: Images,
    geometry: Geometry,
    examples: Int32[np.ndarray, " G"],
    rows: slice,
    frame: Int32[np.ndarray, "2"],
    box_slots: int,
    empty: Empty,
    pasted: DrawPasted | None = None,
) -> Batch:
    """Reads those of a global batch's examples (-1: none) that are this host's rows, into a frame of (height, width).

    pasted: what is pasted into a picture of a group; None: nothing. UserError names an image that is corrupt.
    """
    examples, drawn = examples.tolist(), geometry.take(np.maximum(examples, 0))
    windows = drawn.window()
    own = range(len(examples))[rows]
    count = len(own)
    batch = Batch(
        image=empty((count, *(int(side) for side in frame), 3)),
        size=np.tile(np.int32(frame), (count, 1)),
        original_size=np.tile(np.int32(frame), (count, 1)),
        example=np.array(examples[rows], np.int32),
        boxes=np.zeros((count, box_slots, 4), np.float32),
        labels=np.zeros((count, box_slots), np.int32),
        box_valid=np.zeros((count, box_slots), bool),
    )
    size = GROUP if pasted else 1  # a decoded picture is kept as long as its group
    group = None
    for row, position in enumerate(own):
        if examples[position] < 0:
            batch.image[row] = 0
            continue
        if group is None or position not in group.positions:
            first = position // size * size
            group = _Group(source, examples, drawn, windows, range(first, min(first + size, len(examples))))
        member = position - group.positions.start
        place_image(
            batch.image[row], group.image(member), drawn.flip[position], windows[position], drawn.size[position]
        )
        batch.size[row], batch.original_size[row] = drawn.size[position], drawn.original[position]
        _, _, boxes, labels = group.members[member]
        if pasted:
            pieces, more_boxes, more_labels = pasted(group.members, member, examples[position])
            group.paste(batch.image[row], pieces)
            boxes, labels = np.concatenate([boxes, more_boxes]), np.concatenate([labels, more_labels])
        batch.boxes[row, : len(boxes)] = boxes
        batch.labels[row, : len(boxes)] = labels
        batch.box_valid[row, : len(boxes)] = True
    return batch


class _Group:
    """Some pictures of a batch, each as geometry.py makes it; decoded when they are first needed."""

    def __init__(self, source: Images, examples: list[int], drawn: Geometry, windows: np.ndarray, positions: range):
        self._source, self._examples, self._drawn, self._windows = source, examples, drawn, windows
        self._images: dict[int, np.ndarray] = {}
        self.positions = positions  # in the batch
        self.members = [self._member(position) for position in positions]

    def image(self, member: int) -> np.ndarray:
        """The stored picture, uint8 [h, w, 3]."""
        if member not in self._images:
            source, example = self._source, self._examples[self.positions[member]]
            self._images[member] = source.decode(example) if isinstance(source, _Viewed) else _decode(source, example)
        return self._images[member]

    def paste(self, output: np.ndarray, pieces: list[Piece]) -> None:
        """Lays pieces of the group over an output, uint8 [H, W, 3]."""
        for member, window, (top, left, bottom, right), fade in pieces:
            flip = self._drawn.flip[self.positions[member]]
            paste_window(output[top:bottom, left:right], self.image(member), flip, window, fade)

    def _member(self, position):
        boxes, labels = self._source.targets(self._examples[position])
        boxes, kept = transform_boxes(boxes, self._drawn, position)
        height, width = self._drawn.size[position].tolist()
        return Member((height, width), tuple(self._windows[position].tolist()), boxes, labels[kept])


def _decode(source, example):
    try:
        image = decode_image(source.image_bytes(example), source.orientation(example))
    except CorruptImage as error:
        raise UserError(f"Image {source.filename(example)} is corrupt: {error}.") from error
    if image.shape[:2] != tuple(source.sizes[example]):
        raise UserError(
            f"Image {source.filename(example)} has {image.shape[0]} x {image.shape[1]} pixels (height x width), "
            f"not {source.sizes[example][0]} x {source.sizes[example][1]} as its header or index says."
        )
    return image


def _image_bytes(buckets, rows):
    return int(buckets.prod(1, dtype=np.int64).max()) * 3 * (rows.stop - rows.start)


def _box_slots(source, config):
    """Box slots of every image of the split; refuses config.data.max_boxes when an image has more."""
    if config.max_boxes == 0 or config.max_boxes >= source.max_boxes:
        return config.max_boxes or max(source.max_boxes, 1)
    fullest = next(i for i in range(len(source)) if len(source.targets(i)[0]) == source.max_boxes)
    raise UserError(
        f"Image {source.filename(fullest)} has {source.max_boxes} boxes, more than config.data.max_boxes "
        f"({config.max_boxes}); 0 takes as many as the fullest image needs."
    )

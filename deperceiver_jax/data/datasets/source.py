"""A split of any data set: encoded images by position, with sizes and annotations known beforehand."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, Int32, Int64
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.datasets.bucket_copy import Share, download
from deperceiver_jax.data.datasets.directory_builder import CocoDirectory, directory_config
from deperceiver_jax.data.datasets.index import Index, load_or_build, open_records, read_stored
from deperceiver_jax.data.datasets.layouts.layout import FIELDS, SPLITS
from deperceiver_jax.data.datasets.layouts.recognise import find_split
from deperceiver_jax.data.datasets.orientation import orient
from deperceiver_jax.data.datasets.prepare import prepare
from deperceiver_jax.data.datasets.record import Annotations
from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.data.datasets.shapes.builder import Shapes
from deperceiver_jax.data.datasets.tfds_directory import DESCRIPTION, damage, describe, stored_bytes
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import BUCKETS, as_path, is_bucket

NORMALISED = 1.1  # the most that a number of a normalised box is, rounding and boxes beyond the border included
CLIP_TOLERANCE = 0.5  # pixels; annotations that reach further outside their image are counted


class Source:
    """One split, its images in ascending order of id. Every process opens the files for itself, when it first reads."""

    def __init__(self, prepared: Path, split: str, classes: ClassMap, index: Index, area_scale: float):
        self.classes = classes
        self.area_scale = area_scale  # of COCO's bounds between small, medium and large; 1 for photographs
        self.prepared = prepared  # the folder of its files
        self._split, self._index = split, index
        self._records: Any = None
        self._opened_by: int | None = None
        self._image, self._boxes, self._labels = _targets(index, classes)
        self._target_offsets = np.searchsorted(self._image, np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self._index.image_ids)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_records": None, "_opened_by": None}

    def take(self, positions: Int64[np.ndarray, " n"]) -> "Source":
        """The split that has these images alone; `positions` are ascending."""
        return type(self)(self.prepared, self._split, self.classes, self._index.take(positions), self.area_scale)

    @property
    def sizes(self) -> Int32[np.ndarray, "N 2"]:
        """(height, width) of every image in pixels, turned by its `orientation`."""
        return self._index.sizes

    @property
    def image_ids(self) -> Int64[np.ndarray, " N"]:
        """The data set's own image ids, ascending."""
        return self._index.image_ids

    @property
    def annotated(self) -> bool:
        """Whether anything is annotated. A split of which nothing is, as COCO's test splits, has no metrics."""
        return len(self._index.id) > 0

    @property
    def max_boxes(self) -> int:
        """Targets of the fullest image."""
        return int(np.diff(self._target_offsets).max())

    @property
    def bytes_per_image(self) -> float:
        """What an image and its annotations take on the disk, on average over the split."""
        return stored_bytes(self.prepared, self._split)

    @property
    def filenames(self) -> np.ndarray:
        """The file names of all images, unicode [N]."""
        return self._index.filenames

    def filename(self, position: int) -> str:
        """The image's file name, for messages and pictures."""
        return str(self._index.filenames[position])

    def image_bytes(self, position: int) -> bytes:
        """The image as its file was: JPEG, PNG or another format that Pillow reads."""
        if self._opened_by != os.getpid():  # a forked process must not share its parent's reader
            self._records, self._opened_by = open_records(self.prepared, self._split), os.getpid()
        return read_stored(self._records, int(self._index.record[position]), self.prepared)["image"]

    def orientation(self, position: int) -> int:
        """The EXIF orientation by which the stored image is turned into the one that is annotated; 1: not at all."""
        return int(self._index.orientation[position])

    def annotations(self, position: int) -> Annotations:
        """All annotations of an image as they were written: crowds, unclipped and empty boxes included."""
        rows = slice(*self._index.offsets[position : position + 2])
        index = self._index
        return Annotations(
            index.boxes[rows], index.category_id[rows], index.is_crowd[rows], index.area[rows], index.id[rows]
        )

    def targets(self, position: int) -> tuple[Float32[np.ndarray, "K 4"], Int32[np.ndarray, " K"]]:
        """What a detector shall find: (xyxy boxes in pixels inside the image, class slots). Crowds are left out."""
        rows = slice(*self._target_offsets[position : position + 2])
        return self._boxes[rows].copy(), self._labels[rows].copy()

    def all_targets(self) -> tuple[Int64[np.ndarray, " K"], Float32[np.ndarray, "K 4"], Int32[np.ndarray, " K"]]:
        """(position of the image, box, class slot) of the targets of all images, as `targets` has them."""
        return self._image, self._boxes, self._labels


def open_source(config_data: ConfigDict, split: str) -> Source:
    """Opens a split of the data set that config.data names, preparing it first if need be.

    `shapes` has the splits train and validation, `coco_directory`, in any of datasets/layouts, those that are there,
    `tfds` those that were prepared; `shapes/small` is the built-in data set with many small shapes. Raises UserError,
    in one sentence that names the file and the item, for anything wrong with the data.
    """
    try:
        return _open_source(config_data, split)
    except OSError as error:  # a file or folder that others may not read, somewhere on the way
        raise UserError(f"{error.filename or config_data.directory} cannot be read: {error.strerror}.") from error


def _open_source(config_data, split):
    prepared = _prepared_folder(config_data, split)
    classes, label_ids, notes = describe(prepared, split)
    index = load_or_build(
        prepared,
        split,
        label_ids=label_ids,
        skip_corrupt=config_data.skip_corrupt,
        fallback_directory=_prepared_directory(config_data),
    )
    what = f"{config_data.directory or config_data.name}, split {split}"
    index, turned = orient(index, config_data.exif_orientation)
    require_pixels(index, what)
    found = notes + turned + _oddities(index)
    if found:
        logging.warning("%s: %s.", what, "; ".join(found))
    drawn = config_data.name.startswith("shapes")
    return Source(prepared, split, classes, index, area_scale=drawing.AREA_SCALE if drawn else 1.0)


def _prepared_folder(config_data, split):
    name, _, variant = config_data.name.partition("/")
    if name == "shapes":
        return _prepare_shapes(config_data, split, variant or "standard")
    if name == "coco_directory" and not variant:
        return _prepare_directory(config_data, split)
    if name == "tfds" and not variant:
        return existing_directory(config_data)
    raise UserError(f"config.data.name is {config_data.name!r}; it may be shapes, coco_directory or tfds.")


def _prepared_directory(config_data):
    return Path(config_data.prepared_directory).expanduser().absolute()


def existing_directory(config_data: ConfigDict) -> Path:
    """config.data.directory, or the copy of one in a bucket, made first. Raises UserError where there is none."""
    if not config_data.directory:
        raise UserError(f"config.data.directory is empty, and data set {config_data.name} needs one.")
    if is_bucket(config_data.directory):
        return _from_bucket(config_data.directory, _prepared_directory(config_data) / "buckets")
    directory = Path(config_data.directory).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} (config.data.directory).")
    return directory


@functools.cache  # all that was copied is read again to see whether it is whole: once in a process
def _from_bucket(place, copies):
    directory = copies / place.removeprefix(BUCKETS)
    download(as_path(place), directory, Share(), given_as="config.data.directory")
    return directory


def _prepare_shapes(config_data, split, variant):
    if split not in FIELDS:
        raise UserError(f"Data set {config_data.name} has no split {split!r}; it has {', '.join(FIELDS)}.")
    if variant not in Shapes.builder_configs:
        raise UserError(f"There is no data set shapes/{variant}; there are {', '.join(Shapes.builder_configs)}.")
    config = Shapes.builder_configs[variant]
    return prepare(Shapes, _prepared_directory(config_data), config, f"shapes/{variant}")


def _prepare_directory(config_data, split):
    if split not in SPLITS:
        raise UserError(f"Data set {config_data.name} has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = existing_directory(config_data)
    if copied := copied_splits(root):
        return _copied_folder(root, split, copied)
    config = directory_config(find_split(root, config_data, split), split, config_data.skip_corrupt)
    what = f"split {split} of {root}"
    return prepare(CocoDirectory, _prepared_directory(config_data), config, what, config.image_bytes)


def copied_splits(root: Path) -> list[str]:
    """Of a folder that `deperceiver data prepare --from` has filled; none of any other."""
    return [split for split in SPLITS if os.path.isfile(root / split / DESCRIPTION)]


def _copied_folder(root, split, copied):
    if split not in copied:
        raise UserError(f"{root} has no split {split!r}; what was copied there has {' and '.join(copied)}.")
    if found := damage(root / split):
        remedy = "what is missing is copied by: deperceiver data prepare DIR --from=gs://..."
        raise UserError(f"{root / split} is not whole: {found}; {remedy}.")
    return root / split


def _targets(index, classes):
    """DETR's targets of all images at once: (image [K], xyxy float32 [K, 4], class slot int32 [K]), in stored order.

    No crowds; xywh -> xyxy and the clamp to the image in float32, as DETR computes them; empty boxes left out.
    """
    image = np.repeat(np.arange(len(index.image_ids)), np.diff(index.offsets))
    boxes = index.boxes.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    limit = index.sizes[image][:, [1, 0, 1, 0]].astype(np.float32)
    boxes = np.clip(boxes, 0, limit)
    keep = ~index.is_crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return image[keep], boxes[keep], classes.category_to_slot(index.category_id[keep]).astype(np.int32)


def require_pixels(index: Index, what: str) -> None:
    """Raises UserError for boxes that are not in pixels, from which nothing could be learned or counted."""
    boxes = index.boxes[(index.boxes[:, 2:] > 0).all(axis=1)]
    if len(boxes) == 0 or (boxes[:, 2:] >= 1).any():
        return
    looks = "they look normalised, as YOLO's are" if (np.abs(boxes) <= NORMALISED).all() else "sizes look normalised"
    raise UserError(
        f"{what}: all {len(boxes)} boxes are smaller than a pixel; {looks}, but a bbox is [left, top, width, height] "
        "in pixels."
    )


def odd_boxes(index: Index) -> dict[str, Bool[np.ndarray, " M"]]:
    """Which of an oriented index's boxes are odd, by how they are, in words."""
    image = np.repeat(np.arange(len(index.image_ids)), np.diff(index.offsets))
    low, size = index.boxes[:, :2], index.boxes[:, 2:]
    limit = index.sizes[image][:, ::-1]
    inside = np.clip(low + size, 0, limit) - np.clip(low, 0, limit)
    empty = (inside <= 0).any(axis=1)
    outside = ((low < -CLIP_TOLERANCE) | (low + size > limit + CLIP_TOLERANCE)).any(axis=1) & ~empty
    return {
        "reach outside their image and are clipped": outside,
        "are empty inside their image and are left out": empty,
        "are smaller than a pixel": ((size > 0) & (size < 1)).all(axis=1),
    }


def _oddities(index):
    """What is odd in the annotations, counted, in words."""
    counts = {what: int(odd.sum()) for what, odd in odd_boxes(index).items()}
    counts["are not finite and are left out"] = int(index.non_finite)
    found = [f"{count} boxes {what}" for what, count in counts.items() if count]
    if len(index.skipped):
        found.append(f"{len(index.skipped)} corrupt images are left out (the first is {index.skipped[0]})")
    return found

"""A split of any data set: encoded images by position, with sizes and annotations known beforehand."""

import os
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float32, Int32, Int64
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.index import Index, load_or_build, open_records
from deperceiver_jax.data.prepare import prepare
from deperceiver_jax.data.record import Annotations
from deperceiver_jax.data.shapes.builder import Shapes
from deperceiver_jax.errors import UserError

CLIP_TOLERANCE = 0.5  # pixels; annotations that reach further outside their image are counted


class Source:
    """One split, its images in ascending order of id. Every process opens the files for itself, when it first reads."""

    def __init__(self, prepared: Path, split: str, classes: ClassMap, index: Index):
        self.classes = classes
        self._prepared, self._split, self._index = prepared, split, index
        self._records, self._opened_by = None, None
        self._box_image, self._boxes, self._labels = _targets(index, classes)
        self._target_offsets = np.searchsorted(self._box_image, np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self._index.image_ids)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_records": None, "_opened_by": None}

    @property
    def sizes(self) -> Int32[np.ndarray, "N 2"]:
        """(height, width) of every stored image in pixels."""
        return self._index.sizes

    @property
    def image_ids(self) -> Int64[np.ndarray, " N"]:
        """The data set's own image ids, ascending."""
        return self._index.image_ids

    @property
    def max_boxes(self) -> int:
        """Targets of the fullest image."""
        return int(np.diff(self._target_offsets).max())

    def filename(self, position: int) -> str:
        """The image's file name, for messages and pictures."""
        return str(self._index.filenames[position])

    def image_bytes(self, position: int) -> bytes:
        """The image as its file was: JPEG, PNG or another format that Pillow reads."""
        if self._opened_by != os.getpid():  # a forked process must not share its parent's reader
            self._records, self._opened_by = open_records(self._prepared, self._split), os.getpid()
        return self._records[int(self._index.record[position])]["image"]

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


def open_source(config_data: ConfigDict, split: str) -> Source:
    """Opens a split of the data set that config.data names, preparing it first if need be.

    Raises UserError, in one sentence that names the file and the item, for anything wrong with the data.
    """
    name, _, variant = config_data.name.partition("/")
    if name not in _OPENERS:
        raise UserError(f"config.data.name is {config_data.name!r}; it may be {', '.join(_OPENERS)}.")
    prepared, classes, label_ids = _OPENERS[name](config_data, split, variant)
    index = load_or_build(
        prepared,
        split,
        label_ids=label_ids,
        skip_corrupt=config_data.skip_corrupt,
        fallback_directory=_prepared_directory(config_data),
    )
    _warn(index, prepared, split)
    return Source(prepared, split, classes, index)


def _prepared_directory(config_data):
    return Path(config_data.prepared_directory).expanduser().absolute()


def _open_shapes(config_data, split, variant):
    variant = variant or "standard"
    if variant not in Shapes.builder_configs:
        raise UserError(f"There is no data set shapes/{variant}; there are {', '.join(Shapes.builder_configs)}.")
    directory = _prepared_directory(config_data)
    builder = Shapes(config=variant, data_dir=os.fspath(directory), file_format="array_record")
    prepared = prepare(builder, directory, f"shapes/{variant}")
    return prepared, _stored_classes(builder), np.zeros(0, np.int64)


def _stored_classes(builder):
    return ClassMap.from_categories(builder.info.metadata["categories"])


_OPENERS = {"shapes": _open_shapes}


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


def _warn(index, prepared, split):
    """One line that counts what is odd in the data, whenever it is opened."""
    image = np.repeat(np.arange(len(index.image_ids)), np.diff(index.offsets))
    low, size = index.boxes[:, :2], index.boxes[:, 2:]
    limit = index.sizes[image][:, ::-1]
    inside = np.clip(low + size, 0, limit) - np.clip(low, 0, limit)
    empty = (inside <= 0).any(axis=1)
    outside = ((low < -CLIP_TOLERANCE) | (low + size > limit + CLIP_TOLERANCE)).any(axis=1) & ~empty
    counts = {
        "boxes reach outside their image and are clipped": outside.sum(),
        "boxes are empty inside their image and are left out of the targets": empty.sum(),
        "boxes are not finite and are left out": index.non_finite,
        "corrupt images are left out": len(index.skipped),
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    if len(index.skipped):
        found[-1] += f" (the first is {index.skipped[0]})"
    if found:
        logging.warning("%s, split %s: %s.", prepared, split, "; ".join(found))

"""What a directory says of itself that TFDS prepared: by this package's builders or by the catalogue's `coco/2017`."""

import json
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.json_format import ParseError
from jaxtyping import Int64

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.errors import UserError

DESCRIPTION = "dataset_info.json"
CATALOGUE_FEATURES = {
    "": ("image", "image/filename", "image/id", "objects"),
    "objects": ("area", "bbox", "id", "is_crowd", "label"),
}


def damage(prepared: Path) -> str | None:
    """What is missing or broken, in words, in a directory that this package prepared; None when it is whole."""
    for name, key in {DESCRIPTION: "splits", "features.json": "featuresDict", "metadata.json": "notes"}.items():
        if not (prepared / name).is_file():
            return f"{name} is missing"
        try:
            described = key in json.loads((prepared / name).read_text())
        except ValueError:
            described = False
        if not described:
            return f"{name} is cut or overwritten"
    info = tfds.builder_from_directory(os.fspath(prepared)).info
    return next(filter(None, map(_damaged_shard, info.splits.values())), None)


def _damaged_shard(split):
    """In words, the first file of a split that is missing or cut, which its last bytes tell."""
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        name = os.path.basename(path)
        if not os.path.isfile(path):
            return f"{name} is missing"
        reader = ArrayRecordReader(os.fspath(path))
        if not reader.ok() or reader.num_records() != length:
            return f"{name} is cut or overwritten"
    return None


def stored_bytes(prepared: Path, split: str) -> float:
    """Of an example of a split, on average over its files."""
    info = tfds.builder_from_directory(os.fspath(prepared)).info.splits[split]
    return sum(os.stat(path).st_size for path in info.filepaths) / sum(info.shard_lengths)


def describe(prepared: Path, split: str) -> tuple[ClassMap, Int64[np.ndarray, " labels"], list[str]]:
    """(class map, category id of every label, notes in words) of a prepared directory.

    Raises UserError if it cannot be used. The catalogue's labels 0 to 79 get COCO's ids if they carry COCO's names,
    else they are ids themselves; a directory that this package prepared stores ids, and no labels.
    """
    if not (prepared / DESCRIPTION).is_file():
        raise UserError(
            f"{prepared} is no prepared TFDS data set: it has no {DESCRIPTION}, as coco/2017/1.1.0 would have."
        )
    try:
        info = tfds.builder_from_directory(os.fspath(prepared)).info
    except (OSError, ValueError, ParseError) as error:
        raise UserError(f"{prepared} cannot be read as a TFDS data set: {str(error).rstrip('.')}.") from error
    if split not in info.splits:
        raise UserError(f"{prepared} has no split {split!r}; it has {', '.join(info.splits)}.")
    if info.file_format.value != "array_record":
        raise UserError(
            f"{prepared} is stored as {info.file_format.value}, which has no random access; "
            "prepare it with --file_format=array_record."
        )
    if found := _damaged_shard(info.splits[split]):
        raise UserError(f"{prepared} is not whole: {found}.")
    if info.metadata and "categories" in info.metadata:  # one that this package prepared
        return ClassMap.from_categories(info.metadata["categories"]), np.zeros(0, np.int64), info.metadata["notes"]
    features = info.features.np_dtype
    for place, wanted in CATALOGUE_FEATURES.items():
        present = features.get(place) if place else features
        missing = [key for key in wanted if not isinstance(present, dict) or key not in present]
        if missing:
            feature = f"{place}/{missing[0]}" if place else missing[0]
            raise UserError(f"{prepared} is not like coco/2017: it has no feature {feature}.")
    label = info.features["objects"]["label"]
    if not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"{prepared} is not like coco/2017: its feature objects/label has no class names.")
    names = label.names
    ids = list(COCO_CATEGORIES) if names == list(COCO_CATEGORIES.values()) else range(len(names))
    return ClassMap.from_categories(zip(ids, names, strict=True)), np.array(ids, np.int64), []

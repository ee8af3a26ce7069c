"""What is known of a prepared split without reading a pixel: sizes, ids and annotations, kept in one .npz file."""

import hashlib
import json
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.message import DecodeError
from jaxtyping import Bool, Float64, Int32, Int64
from tqdm import tqdm

from deperceiver_jax.data.datasets.record import read_record
from deperceiver_jax.data.image_header import CorruptImage, image_size
from deperceiver_jax.errors import UserError

INDEX_VERSION = 1


@dataclass(frozen=True)
class Index:
    """Flat arrays over N images, ascending by id, and their M annotations: image i has offsets[i] to offsets[i + 1]."""

    sizes: Int32[np.ndarray, "N 2"]  # (height, width) of the stored image
    image_ids: Int64[np.ndarray, " N"]
    record: Int64[np.ndarray, " N"]  # position of the image in the prepared files
    filenames: np.ndarray  # unicode [N]
    offsets: Int64[np.ndarray, " N_1"]
    boxes: Float64[np.ndarray, "M 4"]  # xywh in pixels, as annotated
    category_id: Int64[np.ndarray, " M"]
    is_crowd: Bool[np.ndarray, " M"]
    area: Float64[np.ndarray, " M"]
    id: Int64[np.ndarray, " M"]
    non_finite: np.ndarray  # number of annotations left out because their box is not finite
    skipped: np.ndarray  # unicode [K], the names of corrupt images that were passed over


def load_or_build(
    prepared: Path,
    split: str,
    *,
    label_ids: Int64[np.ndarray, " labels"],
    skip_corrupt: bool,
    fallback_directory: Path,
) -> Index:
    """The split's Index: from the file beside the prepared data, or made by one pass over all records.

    The file carries a fingerprint of the prepared data and of the settings, so a stale one is made anew. It lies in
    `fallback_directory` when the prepared directory cannot be written. label_ids: see read_record.
    """
    fingerprint = _fingerprint(prepared, split, label_ids, skip_corrupt)
    place = hashlib.sha256(os.fspath(prepared).encode()).hexdigest()[:16]
    files = [home / f"index_{split}.npz" for home in (prepared, fallback_directory / "index" / place)]
    for file in files:
        stored = _load(file, fingerprint)
        if stored is not None:
            return stored
    index = build(prepared, split, label_ids=label_ids, skip_corrupt=skip_corrupt)
    _save(files[0] if os.access(prepared, os.W_OK) else files[1], index, fingerprint)
    return index


def open_records(prepared: Path, split: str):
    """Random access to the stored examples, their images left encoded."""
    builder = tfds.builder_from_directory(os.fspath(prepared))
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def build(prepared: Path, split: str, *, label_ids: Int64[np.ndarray, " labels"], skip_corrupt: bool) -> Index:
    """Reads every record once. Refuses a corrupt image unless skip_corrupt, and a repeated image id."""
    records = open_records(prepared, split)
    kept, skipped = [], []
    print(f"Indexing {len(records)} images of {prepared}, split {split} (once).", file=sys.stderr, flush=True)
    for position in tqdm(range(len(records)), desc=f"Indexing {split}", unit=" images", disable=None):
        record = read_record(_read(records, position, prepared), label_ids)
        try:
            size = image_size(record.image)
        except CorruptImage as error:
            if not skip_corrupt:
                raise UserError(
                    f"{prepared}: image {record.filename} (id {record.image_id}) is corrupt: {error}; "
                    "config.data.skip_corrupt=True passes over such images."
                ) from error
            skipped.append(record.filename)
            continue
        annotations = record.annotations
        if record.boxes_are_shares:
            annotations = annotations._replace(boxes=annotations.boxes * (size[1], size[0], size[1], size[0]))
        kept.append((record.image_id, position, size, record.filename, annotations))
    kept.sort(key=lambda row: row[0])
    _require_unique([row[0] for row in kept], prepared, split)
    return _flatten(kept, skipped)


def _read(records, position, prepared):
    try:
        return records[position]
    except (RuntimeError, ValueError, DecodeError) as error:  # of array_record, TFDS and tf.Example
        raise UserError(f"{prepared} is damaged: record {position} cannot be read ({error}).") from error


def _require_unique(image_ids, prepared, split):
    if not image_ids:
        raise UserError(f"{prepared}: split {split} has no readable image.")
    for before, after in zip(image_ids[:-1], image_ids[1:], strict=True):
        if before == after:
            raise UserError(f"{prepared}: image id {after} is there twice in split {split}.")


def _flatten(kept, skipped):
    columns = [np.concatenate(column) for column in zip(*(row[4] for row in kept), strict=True)]
    counts = np.array([len(row[4].id) for row in kept])
    finite = np.isfinite(columns[0]).all(axis=1)
    image_of = np.repeat(np.arange(len(kept)), counts)[finite]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(image_of, minlength=len(kept)))])
    boxes, category_id, is_crowd, area, id = (column[finite] for column in columns)
    return Index(
        sizes=np.array([row[2] for row in kept], np.int32),
        image_ids=np.array([row[0] for row in kept], np.int64),
        record=np.array([row[1] for row in kept], np.int64),
        filenames=np.array([row[3] for row in kept]),
        offsets=offsets.astype(np.int64),
        boxes=boxes,
        category_id=category_id,
        is_crowd=is_crowd,
        area=area,
        id=id,
        non_finite=np.array(np.sum(~finite)),
        skipped=np.array(skipped, dtype=str),
    )


def _fingerprint(prepared, split, label_ids, skip_corrupt):
    """Changes with the prepared data: dataset_info.json holds every shard's length and the number of bytes."""
    described = (prepared / "dataset_info.json").read_bytes() + (prepared / "features.json").read_bytes()
    settings = json.dumps([INDEX_VERSION, split, [int(id) for id in label_ids], bool(skip_corrupt)])
    return hashlib.sha256(described + settings.encode()).hexdigest()


def _load(path, fingerprint):
    """The stored Index, or None where there is none for this data."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            if str(stored["fingerprint"]) == fingerprint:
                return Index(**{field.name: stored[field.name] for field in fields(Index)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logging.warning("%s cannot be read (%s) and is made anew.", path, error)
    return None


def _save(path, index, fingerprint):
    """Written beside its place and renamed, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: getattr(index, field.name) for field in fields(Index)}
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as scratch:
        try:
            np.savez_compressed(scratch, fingerprint=fingerprint, **arrays)
            scratch.flush()
            os.replace(scratch.name, path)
        except BaseException:
            os.unlink(scratch.name)
            raise

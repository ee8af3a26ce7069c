"""What is known of a prepared split without reading a pixel: sizes, ids and annotations, kept in one .npz file."""

import contextlib
import hashlib
import json
import os
import secrets
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.message import DecodeError
from jaxtyping import Bool, Float64, Int8, Int32, Int64
from tqdm import tqdm

from deperceiver_jax.data.datasets.record import Annotations, read_record
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import written_whole

INDEX_VERSION = 2


@dataclass(frozen=True)
class Index:
    """Flat arrays over N images, ascending by id, and their M annotations: image i has offsets[i] to offsets[i + 1]."""

    sizes: Int32[np.ndarray, "N 2"]  # (height, width) of the stored image
    stated_sizes: Int32[np.ndarray, "N 2"]  # (height, width) as annotated; zeros where nothing is stated
    orientation: Int8[np.ndarray, " N"]  # EXIF's, 1 to 8
    image_ids: Int64[np.ndarray, " N"]
    record: Int64[np.ndarray, " N"]  # position of the image in the prepared files
    filenames: np.ndarray  # unicode [N]
    offsets: Int64[np.ndarray, " N_1"]
    boxes: Float64[np.ndarray, "M 4"]  # xywh as annotated: in pixels or
    boxes_are_shares: np.ndarray  # bool: in shares of the annotated picture's width and height
    category_id: Int64[np.ndarray, " M"]
    is_crowd: Bool[np.ndarray, " M"]
    area: Float64[np.ndarray, " M"]
    id: Int64[np.ndarray, " M"]
    non_finite: np.ndarray  # number of annotations left out because their box is not finite
    skipped: np.ndarray  # unicode [K], the names of corrupt images that were passed over

    def take(self, positions: Int64[np.ndarray, " n"]) -> "Index":
        """Of these images alone, in this order."""
        rows = np.concatenate([np.arange(*self.offsets[position : position + 2]) for position in positions])
        of_images = ("sizes", "stated_sizes", "orientation", "image_ids", "record", "filenames")
        of_rows = ("boxes", "category_id", "is_crowd", "area", "id")
        taken = {name: getattr(self, name)[positions] for name in of_images}
        taken |= {name: getattr(self, name)[rows] for name in of_rows}
        offsets = np.cumsum([0, *np.diff(self.offsets)[positions]])
        return replace(self, **taken, offsets=offsets)


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
    `fallback_directory` when the prepared directory cannot be written, and nowhere when that cannot be written either.
    label_ids: see read_record.
    """
    fingerprint = _fingerprint(prepared, split, label_ids, skip_corrupt)
    place = hashlib.sha256(os.fspath(prepared).encode()).hexdigest()[:16]
    files = [home / f"index_{split}.npz" for home in (prepared, fallback_directory / "index" / place)]
    for file in files:
        stored = _load(file, fingerprint)
        if stored is not None:
            return stored
    index = build(prepared, split, label_ids=label_ids, skip_corrupt=skip_corrupt)
    for file in files if os.access(prepared, os.W_OK) else files[1:]:
        try:
            _save(file, index, fingerprint)
            break
        except OSError as error:
            logging.warning("%s cannot be written (%s), so it is made at every start.", file, error.strerror)
    return index


def open_records(prepared: Path, split: str) -> Sequence[dict]:
    """Random access to the stored examples, their images left encoded. Raises UserError where that fails."""
    with _named(prepared, split):
        builder = tfds.builder_from_directory(os.fspath(prepared))
        return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def read_stored(records: Sequence[dict], position: int, prepared: Path) -> dict:
    """One of `open_records`. Raises UserError where that fails."""
    with _named(prepared, f"record {position}"):
        return records[position]


@contextlib.contextmanager
def _named(prepared, what):
    try:
        yield
    except (OSError, RuntimeError, ValueError, DecodeError) as error:  # of array_record, TFDS and tf.Example
        raise UserError(
            f"{prepared} is damaged: {what} cannot be read ({error}); delete this folder and prepare it anew."
        ) from error


def build(prepared: Path, split: str, *, label_ids: Int64[np.ndarray, " labels"], skip_corrupt: bool) -> Index:
    """Reads every record once. Refuses a corrupt image unless skip_corrupt, and a repeated image id."""
    records = open_records(prepared, split)
    kept, skipped, boxes_are_shares = [], [], False
    print(f"Indexing {len(records)} images of {prepared}, split {split} (once).", file=sys.stderr, flush=True)
    for position in tqdm(range(len(records)), desc=f"Indexing {split}", unit=" images", disable=None):
        record = read_record(read_stored(records, position, prepared), label_ids)
        try:
            size, orientation = image_size(record.image), exif_orientation(record.image)
        except CorruptImage as error:
            if not skip_corrupt:
                raise UserError(
                    f"{prepared}: image {record.filename} (id {record.image_id}) is corrupt: {error}; "
                    "config.data.skip_corrupt=True passes over such images."
                ) from error
            skipped.append(record.filename)
            continue
        header = size, record.stated_size, orientation
        kept.append((record.image_id, position, header, record.filename, record.annotations))
        boxes_are_shares = record.boxes_are_shares
    kept.sort(key=lambda row: row[0])
    _require_unique([row[0] for row in kept], prepared, split)
    return flatten(kept, skipped, boxes_are_shares)


def _require_unique(image_ids, prepared, split):
    if not image_ids:
        raise UserError(f"{prepared}: split {split} has no readable image.")
    for before, after in zip(image_ids[:-1], image_ids[1:], strict=True):
        if before == after:
            raise UserError(f"{prepared}: image id {after} is there twice in split {split}.")


def flatten(
    kept: Sequence[tuple[int, int, tuple[tuple[int, int], tuple[int, int], int], str, Annotations]],
    skipped: Sequence[str],
    boxes_are_shares: bool,
) -> Index:
    """The Index of rows (image id, record, (stored size, stated size, orientation), file name, annotations), by id."""
    columns = [np.concatenate(column) for column in zip(*(row[4] for row in kept), strict=True)]
    counts = np.array([len(row[4].id) for row in kept])
    finite = np.isfinite(columns[0]).all(axis=1)
    image_of = np.repeat(np.arange(len(kept)), counts)[finite]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(image_of, minlength=len(kept)))])
    boxes, category_id, is_crowd, area, id = (column[finite] for column in columns)
    return Index(
        sizes=np.array([row[2][0] for row in kept], np.int32),
        stated_sizes=np.array([row[2][1] for row in kept], np.int32),
        orientation=np.array([row[2][2] for row in kept], np.int8),
        image_ids=np.array([row[0] for row in kept], np.int64),
        record=np.array([row[1] for row in kept], np.int64),
        filenames=np.array([row[3] for row in kept]),
        offsets=offsets.astype(np.int64),
        boxes=boxes,
        boxes_are_shares=np.array(boxes_are_shares),
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
    """So that no reader meets half a file, and several writers none of another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: getattr(index, field.name) for field in fields(Index)}
    with written_whole(path, f".{secrets.token_hex(4)}.tmp") as partial, open(partial, "wb") as file:
        np.savez_compressed(file, fingerprint=fingerprint, **arrays)

"""What was found, in the formats of other programs: COCO's results, CSV, YOLO's text files."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import is_bucket, make_folder, reason, write_whole, written_whole
from deperceiver_jax.prediction.detections import PictureDetections

COLUMNS = ("file_name", "frame", "image_id", "category_id", "category_name", "score", "left", "top", "right", "bottom")


class Looked(NamedTuple):
    """A picture, or a frame of a video, that was looked at."""

    file: Path
    place: Path  # of its drawn picture below the output folder
    image_id: int
    found: PictureDetections
    frame: int | None = None  # of a video, from 0


class Results(Protocol):
    """One format, open."""

    def add(self, looked: Looked) -> None: ...


@contextlib.contextmanager
def coco_results_file(output: Path, classes: ClassMap) -> Iterator[Results]:
    """detections.json: COCO's results format, with each detection's file and class name beside it."""
    with written_whole(output / "detections.json") as partial, open(partial, "w") as file:
        file.write("[")
        yield _CocoResults(file)
        file.write("\n]\n")


class _CocoResults:
    def __init__(self, file):
        self._file, self._separator = file, ""

    def add(self, looked: Looked) -> None:
        found = looked.found
        boxes = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1).tolist()
        rows = zip(boxes, found.scores.tolist(), found.category_ids.tolist(), found.names.tolist(), strict=True)
        for box, score, category, name in rows:
            entry = {"image_id": looked.image_id, "category_id": category, "bbox": box, "score": score}
            entry |= {"file_name": str(looked.file), "category_name": name}
            entry |= {} if looked.frame is None else {"frame": looked.frame}
            self._file.write(f"{self._separator}\n {json.dumps(entry, allow_nan=False)}")
            self._separator = ","


@contextlib.contextmanager
def csv_file(output: Path, classes: ClassMap) -> Iterator[Results]:
    """detections.csv: a line a detection, boxes in pixels; see COLUMNS."""
    with (
        written_whole(output / "detections.csv") as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        yield _Csv(writer)


class _Csv:
    def __init__(self, writer):
        self._writer = writer

    def add(self, looked: Looked) -> None:
        found, frame = looked.found, "" if looked.frame is None else looked.frame
        rows = zip(found.category_ids, found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        for category, name, score, box in rows:
            self._writer.writerow([looked.file, frame, looked.image_id, category, name, score, *box])


@contextlib.contextmanager
def yolo_files(output: Path, classes: ClassMap) -> Iterator[Results]:
    """labels/NAME.txt: class, centre x and y, width, height as shares of the picture, and score; and classes.txt.

    A class is its line in classes.txt, counted from 0. Boxes are clipped to the picture.
    """
    write_whole(output / "classes.txt", "".join(f"{name}\n" for name in classes.names))
    yield _Yolo(output, classes)


class _Yolo:
    def __init__(self, output: Path, classes: ClassMap):
        self._folder, self._slots, self._taken = output / "labels", classes.slots, set[Path]()

    def add(self, looked: Looked) -> None:
        name = looked.place.name if looked.frame is not None else looked.file.name
        target = self._folder / looked.place.with_name(name).with_suffix(".txt")
        if target in self._taken:  # of a.jpg and a.png
            target = self._folder / f"{looked.place}.txt"
        self._taken.add(target)
        found = looked.found
        height, width = found.size
        boxes = np.clip(found.boxes / [width, height, width, height], 0, 1)
        centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        rows = zip(found.labels.tolist(), np.concatenate([centres, extents], axis=1), found.scores, strict=True)
        lines = []
        for label, box, score in rows:
            numbers = " ".join(f"{number:.6g}" for number in (*box, score))
            lines.append(f"{self._slots.index(label)} {numbers}\n")
        make_folder(target.parent)
        write_whole(target, "".join(lines))


FORMATS = {"coco": coco_results_file, "csv": csv_file, "yolo": yolo_files}


def read_image_ids(annotations: Path, files: Sequence[Path]) -> list[int]:
    """The data set's own id of each file, by the file_name that the COCO-format file `annotations` lists.

    A file_name may have folders; it is the end of the file's path. Raises UserError for a file that is not listed.
    """
    try:
        content = json.loads(annotations.read_bytes())
        ids = {os.path.normpath(image["file_name"]): int(image["id"]) for image in content["images"]}
    except OSError as error:
        raise UserError(f"--annotations: {annotations} cannot be read: {reason(error)}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--annotations: {annotations} is not in COCO's format: it lists no images.") from error
    found = []
    for file in files:
        parts = (file if is_bucket(file) else file.absolute()).parts
        ends = (os.path.join(*parts[start:]) for start in range(1, len(parts)))
        name = next((end for end in ends if end in ids), None)
        if name is None:
            raise UserError(f"--annotations: {annotations} does not list {file}, so it has no image_id.")
        found.append(ids[name])
    return found

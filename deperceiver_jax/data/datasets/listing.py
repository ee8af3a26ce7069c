"""What the files of a split list, whatever their layout: pictures, categories and annotations, in COCO's terms."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deperceiver_jax.data.datasets.record import Annotations


@dataclass(frozen=True)
class Listing:
    """The images of a split in ascending order of id, and the annotations of each in the file's order."""

    categories: list[tuple[int, str]]
    image_ids: list[int]
    filenames: list[str]
    stated_sizes: list[tuple[int, int] | None]  # (height, width) as the files say, if they say so
    annotations: list[Annotations]
    notes: list[str]  # what is odd in the files, counted, in words
    boxes_are_shares: bool = False  # of the width and height of the picture; its areas are shares, too

    def take(self, positions: Sequence[int]) -> "Listing":
        """These images alone."""
        columns = {
            name: [getattr(self, name)[position] for position in positions]
            for name in ("image_ids", "filenames", "stated_sizes", "annotations")
        }
        return Listing(self.categories, **columns, notes=self.notes, boxes_are_shares=self.boxes_are_shares)


@dataclass(frozen=True)
class SplitFiles:
    """Where the pictures and annotations of a split lie. `names`, of pictures, are paths below `image_directory`.

    listed_by: the file or folder that lists the pictures. state: what the annotations are, as JSON takes it; it differs
    when they do.
    """

    listed_by: str
    image_directory: Path
    names: list[str]
    state: object
    read: Callable[[], Listing]  # raises UserError for annotations that are not what they should be


def file_state(path: str | os.PathLike) -> tuple[int, int] | None:
    """(size, time of the last change in nanoseconds) of a file; None where there is none of this name."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # nothing there, or nothing that could be a name
        return None
    return found.st_size, found.st_mtime_ns


def columns(rows: Sequence[tuple]) -> Annotations:
    """The annotations of an image from rows (xywh box, category id, is crowd, area, id)."""
    boxes, category_id, is_crowd, area, id = zip(*rows, strict=True) if rows else [()] * 5
    return Annotations(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        category_id=np.array(category_id, np.int64),
        is_crowd=np.array(is_crowd, bool),
        area=np.array(area, np.float64),
        id=np.array(id, np.int64),
    )

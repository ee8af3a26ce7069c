"""Which images of a data set are turned as their EXIF orientation says, so that boxes and pixels are in one frame."""

from dataclasses import replace

import numpy as np

from deperceiver_jax.data.datasets.index import Index
from deperceiver_jax.data.image_header import is_swapped
from deperceiver_jax.errors import check_choice

CHOICES = ("annotated", "apply", "ignore")  # of config.data.exif_orientation


def orient(index: Index, choice: str) -> tuple[Index, list[str]]:
    """(index, notes): its `orientation` has what is applied to each image, 1 for nothing, `sizes` what comes out,
    and `boxes` are pixels of that.

    choice: "annotated" applies an orientation unless the annotated size fits the stored picture alone. Where it fits
    both or neither, nothing is proven, and a note in words counts those images. "apply" and "ignore" decide for all.
    Raises UserError for another one.
    """
    check_choice("config.data.exif_orientation", choice, CHOICES)
    stored, stated = index.sizes, index.stated_sizes
    upright = np.where(is_swapped(index.orientation)[:, None], stored[:, ::-1], stored)
    fits_stored, fits_upright = (stored == stated).all(axis=1), (upright == stated).all(axis=1)
    applied = index.orientation != 1
    open_question = applied & (fits_stored == fits_upright)
    if choice == "ignore":
        applied = np.zeros_like(applied)
    elif choice == "annotated":
        applied = applied & ~(fits_stored & ~fits_upright)
    notes = []
    if choice == "annotated" and open_question.any():
        first = index.filenames[open_question.argmax()]
        notes.append(
            f"{open_question.sum()} images have an EXIF orientation of which their annotated size does not tell "
            f"whether boxes are in the turned picture, and are turned, as a viewer shows them (the first is {first}; "
            "config.data.exif_orientation=apply or ignore decides it)"
        )
    sizes = np.where(applied[:, None], upright, stored)
    boxes = index.boxes
    if index.boxes_are_shares:
        boxes = boxes * np.repeat(sizes[:, [1, 0, 1, 0]], np.diff(index.offsets), axis=0)
    orientation = np.where(applied, index.orientation, 1).astype(np.int8)
    return replace(index, sizes=sizes, orientation=orientation, boxes=boxes, boxes_are_shares=np.array(False)), notes

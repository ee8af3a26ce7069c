"""One stored example: the image as its file's bytes, and every annotation as its author wrote it.

Both builders of this package store this record. The catalogue's `coco/2017` stores another one, with the same content;
`read_record` reads either.
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float64, Int64

STATED_SIZE, BOXES_ARE_SHARES = "image/stated_size", "image/boxes_are_shares"  # features of images from files alone


class Annotations(NamedTuple):
    """What is annotated in one image, in the stored order: nothing is dropped, clipped or rounded."""

    boxes: Float64[np.ndarray, "M 4"]  # xywh in pixels of the stored image, or in shares of it
    category_id: Int64[np.ndarray, " M"]  # the data set's own ids
    is_crowd: Bool[np.ndarray, " M"]
    area: Float64[np.ndarray, " M"]  # pixels; of the outline where there is one, not of the box
    id: Int64[np.ndarray, " M"]


class Record(NamedTuple):
    """An image and its annotations. The catalogue's and YOLO's boxes are shares of a size that the image tells."""

    image: bytes  # JPEG, PNG or another format that Pillow reads
    filename: str
    image_id: int
    annotations: Annotations
    boxes_are_shares: bool  # of (width, height, width, height)
    stated_size: tuple[int, int]  # (height, width) as annotated, which may be of the turned image; zeros: not stated


def record_features() -> tfds.features.FeaturesDict:
    """The TFDS features of a record. Numbers are stored as bytes, since tf.Example would round them to float32."""

    def column(dtype, *axes):
        return tfds.features.Tensor(shape=(None, *axes), dtype=dtype, encoding="bytes")

    objects = {
        "bbox": column(np.float64, 4),
        "category_id": column(np.int64),
        "is_crowd": column(np.uint8),
        "area": column(np.float64),
        "id": column(np.int64),
    }
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.FeaturesDict(objects),
        }
    )


def example(image: bytes, filename: str, image_id: int, annotations: Annotations) -> dict[str, Any]:
    """The example that a builder yields for `record_features`."""
    objects = {
        "bbox": annotations.boxes,
        "category_id": annotations.category_id,
        "is_crowd": annotations.is_crowd.astype(np.uint8),
        "area": annotations.area,
        "id": annotations.id,
    }
    return {"image": image, "image/filename": filename, "image/id": image_id, "objects": objects}


def read_record(stored: dict[str, Any], label_ids: Int64[np.ndarray, " labels"]) -> Record:
    """A stored example, as it comes from TFDS with the image left encoded. label_ids: the catalogue's labels -> ids."""
    objects = stored["objects"]
    catalogue = "label" in objects
    boxes = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
    if catalogue:
        low, high = boxes[:, [1, 0]], boxes[:, [3, 2]]  # TFDS writes (ymin, xmin, ymax, xmax)
        boxes = np.concatenate([low, high - low], axis=1)
        category_id = label_ids[np.asarray(objects["label"], np.int64)]
    else:
        category_id = np.asarray(objects["category_id"], np.int64)
    annotations = Annotations(
        boxes=boxes,
        category_id=category_id,
        is_crowd=np.asarray(objects["is_crowd"], bool),
        area=np.asarray(objects["area"], np.float64),
        id=np.asarray(objects["id"], np.int64),
    )
    height, width = stored.get(STATED_SIZE, (0, 0))
    return Record(
        image=stored["image"],
        filename=stored["image/filename"].decode(),
        image_id=int(stored["image/id"]),
        annotations=annotations,
        boxes_are_shares=catalogue or bool(stored.get(BOXES_ARE_SHARES, False)),
        stated_size=(int(height), int(width)),
    )

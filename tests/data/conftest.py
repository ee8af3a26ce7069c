"""Small data sets on disk, in COCO's layout."""

import json

import numpy as np
import pytest
import simplejpeg
from ml_collections import ConfigDict

from configs.base import base

FILES = {"train": ("instances_train2017.json", "train2017"), "validation": ("instances_val2017.json", "val2017")}


def _jpeg(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90)


class CocoFolder:
    """A directory in COCO's layout, written by `write`, with the config.data that opens it."""

    def __init__(self, root, prepared):
        self.root, self.prepared = root, prepared

    def write(self, annotations=(), *, split="train", sizes=None, categories=None, images=None, change=None):
        """sizes: {image id: (height, width)}, each stored as <id>.jpg. images: {file name: bytes} to store instead."""
        file, folder = FILES[split]
        sizes = {7: (40, 60), 3: (30, 50)} if sizes is None else sizes
        stored = {f"{id}.jpg": _jpeg(*size, seed=id % 2**32) for id, size in sizes.items()} | (images or {})
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in stored.items():
            (self.root / folder / name).write_bytes(content)
        content = {
            "images": [{"id": id, "file_name": f"{id}.jpg", "height": h, "width": w} for id, (h, w) in sizes.items()],
            "annotations": list(annotations),
            "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}] if categories is None else categories,
        }
        if change is not None:
            change(content)
        self.annotation_file(split).parent.mkdir(exist_ok=True)
        self.annotation_file(split).write_text(json.dumps(content))
        return content

    @staticmethod
    def annotation(id: int, image_id: int, bbox: list, category_id: int = 1, **fields) -> dict:
        """An annotation as COCO writes it."""
        rest = {"area": 1.0, "iscrowd": 0, "segmentation": []}
        return {"id": id, "image_id": image_id, "bbox": bbox, "category_id": category_id} | rest | fields

    def annotation_file(self, split="train"):
        return self.root / "annotations" / FILES[split][0]

    def image_file(self, name, split="train"):
        return self.root / FILES[split][1] / name

    def config(self, **fields) -> ConfigDict:
        data = base().data
        data.directory, data.prepared_directory = str(self.root), str(self.prepared)
        data.update(fields)
        return data

    def leftovers(self) -> list[str]:
        """Files under the prepared directory, without the lock."""
        files = [path for path in self.prepared.rglob("*") if path.is_file() and path.name != ".lock"]
        return sorted(str(path.relative_to(self.prepared)) for path in files)


@pytest.fixture
def coco_folder(tmp_path):
    return CocoFolder(tmp_path / "coco", tmp_path / "prepared")

"""A split held in memory, as much of `data.Source` as evaluation reads, and random detections that fit it."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

CLASSES = SimpleNamespace(category_ids=[3, 7, 8, 40], names=["ant", "bee", "cat", "dog"], slots=[3, 7, 8, 40])


@dataclass
class MemorySource:
    """Annotations by image; areas are half of the box, as a segmentation's would be."""

    sizes: np.ndarray
    image_ids: np.ndarray
    boxes: list  # xywh pixels
    categories: list
    crowds: list
    classes: SimpleNamespace = field(default_factory=lambda: CLASSES)

    def __len__(self):
        return len(self.image_ids)

    def annotations(self, i):
        area = self.boxes[i][:, 2] * self.boxes[i][:, 3] / 2
        return SimpleNamespace(
            boxes=self.boxes[i], category_id=self.categories[i], is_crowd=self.crowds[i], area=area, id=None
        )


def random_source(seed=0, images=40) -> MemorySource:
    """Boxes of all three sizes; every fifth image is empty, every tenth box a crowd."""
    rng = np.random.default_rng(seed)
    boxes, categories, crowds = [], [], []
    for i in range(images):
        n = 0 if i % 5 == 4 else int(rng.integers(1, 12))
        side = np.exp(rng.uniform(np.log(8), np.log(300), (n, 2)))
        corner = rng.uniform(0, 1, (n, 2)) * np.maximum([640, 480] - side, 1)
        boxes.append(np.concatenate([corner, side], axis=1))
        categories.append(rng.choice(CLASSES.category_ids, n))
        crowds.append(rng.uniform(size=n) < 0.1)
    sizes = np.tile(np.array([[480, 640]], np.int32), (images, 1))
    ids = rng.permutation(np.arange(1000, 1000 + images)).astype(np.int64)
    return MemorySource(sizes, ids, boxes, categories, crowds)


def random_results(source, seed=1, extra=30, near=0.8) -> list[dict]:
    """Most boxes found with some error, and false ones; scores have one decimal, so that there are many ties."""
    rng = np.random.default_rng(seed)
    results = []
    for i, image_id in enumerate(source.image_ids.tolist()):
        found = rng.uniform(size=len(source.boxes[i])) < near
        boxes = source.boxes[i][found] * rng.uniform(0.9, 1.1, (found.sum(), 4))
        false = rng.uniform([0, 0, 5, 5], [600, 440, 200, 200], (extra, 4))
        labels = np.concatenate([source.categories[i][found], rng.choice(CLASSES.category_ids, extra)])
        for box, category in zip(np.concatenate([boxes, false]).tolist(), labels.tolist(), strict=True):
            score = round(float(rng.uniform()), 1)
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


@pytest.fixture
def source():
    return random_source()


@pytest.fixture
def results(source):
    return random_results(source)

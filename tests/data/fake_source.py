"""A split in memory: small drawn images and boxes, without files or TFDS."""

import os
import signal
from dataclasses import dataclass, field

import numpy as np

from benchmarks.input_pipeline import encode_jpeg, photograph


@dataclass
class FakeSource:
    """Image i is a JPEG of sizes[i] with i % (max_boxes + 1) boxes, all labelled i + 1, inside the image."""

    shapes: list[tuple[int, int]]
    max_boxes: int = 3
    broken: dict[int, bytes] = field(default_factory=dict)  # position -> what its file holds instead
    deadly: int = -1  # reading this position kills the process

    def __post_init__(self):
        self.sizes = np.array(self.shapes, np.int32)
        self._images = [encode_jpeg(photograph(h, w, seed)) for seed, (h, w) in enumerate(self.shapes)]

    def __len__(self) -> int:
        return len(self.shapes)

    def filename(self, position: int) -> str:
        return f"{position:03}.jpg"

    def image_bytes(self, position: int) -> bytes:
        if position == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.broken.get(position, self._images[position])

    def orientation(self, position: int) -> int:
        return 1

    def targets(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        count = position % (self.max_boxes + 1)
        corners = np.random.default_rng(position).random((count, 2, 2)) * 0.5 + [[[0.0], [0.5]]]
        boxes = corners.reshape(count, 4) * np.tile(self.sizes[position][::-1], 2)
        return boxes.astype(np.float32), np.full(count, position + 1, np.int32)

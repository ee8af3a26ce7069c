"""Pictures of the built-in data set with any number of shapes of one class, which no split has."""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32

from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.errors import UserError

TRIES = 10  # pictures that are drawn for one in which all shapes find a place


class Crowds:
    """`pictures` for each of `counts`, in their order, as the loader takes images (data/batches/loader.py).

    Shapes are small and medium, in the recipe's odds: as many large ones would not fit. No picture is one of a split.
    Raises UserError for a count that does not fit into a picture.
    """

    def __init__(self, recipe: drawing.Recipe, label: int, counts: list[int], pictures: int):
        self.counts = np.repeat(counts, pictures)
        odds = np.array([*recipe.size_odds[:2], 0.0])
        odds = tuple((odds / odds.sum()).tolist())
        self.pictures = []
        for count in counts:
            crowd = dataclasses.replace(recipe, objects=(count, count), size_odds=odds)
            self.pictures += self._draw(crowd, label, count, pictures)

    @staticmethod
    def _draw(recipe, label, count, pictures):
        # Far behind those of the split, and other ones for each count.
        start = 1_000_000 + count * 10_000
        drawn = (drawing.draw(recipe, "validation", index, label) for index in range(start, start + pictures * TRIES))
        found = []
        for picture in drawn:
            found += [picture] if len(picture.labels) == count else []
            if len(found) == pictures:
                return found
        raise UserError(f"{count} shapes do not fit into one picture of this data set; ask for fewer.")

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def sizes(self) -> Int32[np.ndarray, "N 2"]:
        return np.array([picture.image.shape[:2] for picture in self.pictures], np.int32)

    @property
    def max_boxes(self) -> int:
        return int(self.counts.max())

    def filename(self, position: int) -> str:
        return f"crowd_{position}.jpg"

    def image_bytes(self, position: int) -> bytes:
        return drawing.encode(self.pictures[position].image)

    def orientation(self, position: int) -> int:
        return 1

    def targets(self, position: int) -> tuple[Float32[np.ndarray, "K 4"], Int32[np.ndarray, " K"]]:
        """(xyxy boxes in pixels, positions in CLASSES)."""
        boxes = self.pictures[position].boxes
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        return corners.astype(np.float32), self.pictures[position].labels.astype(np.int32)

"""What was found in one picture, as NumPy arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.structures import Detections

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False)
class PictureDetections:
    """The K objects of one picture, best score first.

    >>> for box, score, name in zip(found.boxes, found.scores, found.names):
    ...     print(name, score, box)
    """

    boxes: Float32[np.ndarray, "K 4"]  # left, top, right, bottom in pixels of the upright picture, not clipped to it
    scores: Float32[np.ndarray, " K"]  # in [0, 1]
    labels: Int64[np.ndarray, " K"]  # class slots, the positions of the classes among the detector's logits
    names: Shaped[np.ndarray, " K"]  # of the classes, as text
    category_ids: Int64[np.ndarray, " K"]  # the data set's own numbers of the classes, as in its annotations
    size: tuple[int, int]  # (height, width) of the upright picture in pixels

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, which: Bool[np.ndarray, " K"] | slice) -> "PictureDetections":
        """Some of them.

        >>> sure = found.take(found.scores > 0.9)
        """
        boxes, scores, labels = self.boxes[which], self.scores[which], self.labels[which]
        return PictureDetections(boxes, scores, labels, self.names[which], self.category_ids[which], self.size)

    def to_supervision(self) -> "supervision.Detections":
        """The same for the supervision package: class_id has the labels, data the class names and category ids.

        Raises UserError where supervision is not installed.

        >>> supervision.BoxAnnotator().annotate(picture, found.to_supervision())
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError("to_supervision needs the package supervision: pip install supervision.") from error
        data: dict[str, Any] = {"class_name": self.names, "category_id": self.category_ids}
        return supervision.Detections(self.boxes, confidence=self.scores, class_id=self.labels, data=data)


class Reader:
    """Turns rows of a batch's answer into PictureDetections, by what the class slots mean."""

    def __init__(self, classes: ClassMap):
        self._used = np.zeros(classes.num_slots, bool)
        self._names = np.full(classes.num_slots, "", f"U{max(map(len, classes.names), default=1)}")
        self._category_ids = np.zeros(classes.num_slots, np.int64)
        slots = list(classes.slots)
        self._used[slots], self._names[slots], self._category_ids[slots] = True, classes.names, classes.category_ids

    def read(self, row: Detections, size: Iterable[int], threshold: float, most: int) -> PictureDetections:
        """row: one picture's [K] scores and labels and [K, 4] boxes. Slots that stand for no class are left out."""
        scores, labels, boxes = row
        kept = np.flatnonzero((scores >= threshold) & self._used[labels])[:most]
        labels = labels[kept].astype(np.int64)
        height, width = map(int, size)
        names, category_ids = self._names[labels], self._category_ids[labels]
        return PictureDetections(boxes[kept], scores[kept], labels, names, category_ids, (height, width))

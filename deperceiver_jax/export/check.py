"""Whether a file answers as JAX does: the answers of all queries, and the detections that a person would see."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.export.choices import TOLERANCE
from deperceiver_jax.export.program import Answers
from deperceiver_jax.structures import Batch


@dataclass
class Comparison:
    """How far a file is from JAX, picture after picture; the first that is too far ends it with a UserError."""

    name: str  # of the file
    classes: ClassMap
    threshold: float  # of the scores of the detections that must be the same
    exact: bool = True  # else nothing must be near, but only finite; the AP tells how good it is
    logits: float = field(default=0.0, init=False)  # the largest differences
    boxes: float = field(default=0.0, init=False)
    pictures: int = field(default=0, init=False)
    detections: int = field(default=0, init=False)
    ties: int = field(default=0, init=False)  # pictures with proposals so near to one another that rounding decides

    def add(self, batch: Batch, title: Callable[[int], str], expected: Answers, lead, found: Answers) -> None:
        """lead: see reference_program. title: of an example, to name it."""
        for row in np.flatnonzero(batch.example >= 0):
            height, width = batch.size[row]
            frame = " x ".join(map(str, batch.image.shape[1:3]))
            where = f"{title(batch.example[row])} ({height} x {width} in a frame of {frame})"
            ours, theirs = (Answers(*(np.asarray(part)[row] for part in a)) for a in (expected, found))
            self._add_picture(where, ours, theirs, None if lead is None else lead[row], batch.original_size[row])

    def _add_picture(self, where: str, ours: Answers, theirs: Answers, lead: float | None, original) -> None:
        self.pictures += 1
        theirs_by_query = theirs
        tolerance = TOLERANCE if self.exact else np.finfo(np.float32).max
        if lead is not None and not _near(ours, theirs):  # queries of equal proposals may come in another order
            theirs_by_query = _reordered(ours, theirs)
            if lead < TOLERANCE and not _near(ours, theirs_by_query):
                self.ties += 1
                return
        for name in ("query_logits", "query_boxes"):
            a, b = getattr(ours, name), getattr(theirs_by_query, name)
            far = np.abs(a - b)
            if not far.max() <= tolerance:  # NaN is not
                query, column = np.unravel_index(np.argmax(np.nan_to_num(far, nan=np.inf)), far.shape)
                what = (
                    f"logit of {self._class(column)}" if name == "query_logits" else f"{('cx', 'cy', 'w', 'h')[column]}"
                )
                self._refuse(where, f"query {query}, {what}", b[query, column], a[query, column])
        self.logits = max(self.logits, float(np.abs(ours.query_logits - theirs_by_query.query_logits).max()))
        self.boxes = max(self.boxes, float(np.abs(ours.query_boxes - theirs_by_query.query_boxes).max()))
        if not self.exact:
            return
        self.detections += int((ours.scores > self.threshold).sum())
        pixels = TOLERANCE * max(original)
        for first, second, whose in ((ours, theirs, "JAX"), (theirs, ours, "the file")):
            for at in np.flatnonzero(first.scores > self.threshold + TOLERANCE):
                same = (
                    (second.labels == first.labels[at])
                    & (np.abs(second.scores - first.scores[at]) <= TOLERANCE)
                    & (np.abs(second.boxes - first.boxes[at]).max(axis=1) <= pixels)
                )
                if not same.any():
                    raise UserError(
                        f"{self.name} is not written: at {where}, only {whose} has the detection "
                        f"{self._class(first.labels[at])} with score {first.scores[at]:.4f}."
                    )

    def _class(self, slot: Any) -> str:
        return self.classes.name(int(slot)) if slot < self.classes.num_slots else "no object"

    def _refuse(self, where: str, what: str, found: float, expected: float) -> None:
        raise UserError(
            f"{self.name} is not written: at {where}, {what} is {found:.6g} in the file and {expected:.6g} in JAX."
        )

    def __str__(self) -> str:
        ties = f" ({self.ties} have proposals that rounding tells apart)" if self.ties else ""
        if not self.exact:
            return f"{self.pictures} pictures, logits within {self.logits:.1e}, boxes within {self.boxes:.1e}"
        return (
            f"{self.pictures} pictures{ties}, logits within {self.logits:.1e}, boxes within {self.boxes:.1e}, "
            f"the same {self.detections} detections above {self.threshold:g}"
        )


def _rows(answers: Answers) -> np.ndarray:
    return np.concatenate([answers.query_logits, answers.query_boxes], axis=1)


def _near(a: Answers, b: Answers) -> bool:
    return bool(np.abs(_rows(a) - _rows(b)).max() <= TOLERANCE)


def _reordered(ours: Answers, theirs: Answers) -> Answers:
    """`theirs` with its queries in the order of ours."""
    if not np.isfinite(_rows(theirs)).all():
        return theirs
    _, order = linear_sum_assignment(cdist(_rows(ours), _rows(theirs), "chebyshev"))
    return theirs._replace(query_logits=theirs.query_logits[order], query_boxes=theirs.query_boxes[order])

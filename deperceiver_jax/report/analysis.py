"""What the report tells beyond metrics.json, counted from the same two things: ground truth and detections."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from deperceiver_jax.evaluation.coco_metric import Counted, Matches, best_threshold, count, matches, positions_by_class

THRESHOLDS = np.linspace(0, 1, 101)


class Analysis(NamedTuple):
    """A split counted, and the threshold at which the report looks at it."""

    counted: Counted
    matches: Matches
    names: list[str]  # of the classes, each another one
    threshold: float  # of the best F1 over all classes; 0.5 where no detection is right


def analyse(truth: dict, results: list[dict], *, max_detections: int, area_scale: float) -> Analysis:
    """Arguments as those of `coco_metric`."""
    counted = count(truth, results, max_detections=max_detections, area_scale=area_scale)
    found = matches(counted)
    boxes = int((~counted.crowd).sum())
    best = best_threshold(counted.score[found.counts], found.right[found.counts], boxes)["threshold"]
    often = Counter(item["name"] for item in counted.classes)
    names = [str(c["name"]) if often[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in counted.classes]
    return Analysis(counted, found, names, 0.5 if best is None else best)


def box_scores(analysis: Analysis) -> Float64[np.ndarray, " A"]:
    """Of every annotation, the score of the detection that found it; -1: none did.

    Detections are matched before their scores are compared with a threshold, as COCO's metric does it, so this is also
    the threshold up to which the box counts as found.
    """
    found_by = analysis.matches.found_by
    scores = np.full(len(found_by), -1.0)
    scores[found_by >= 0] = analysis.counted.score[found_by[found_by >= 0]]
    return scores


def boxes_by_class(counted: Counted) -> list[int]:
    """How many there are to find."""
    return np.bincount(counted.box_class[~counted.crowd], minlength=len(counted.classes)).tolist()


def threshold_curves(analysis: Analysis, classes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(precision, recall) from each of THRESHOLDS on: of all detections, then of each of `classes`."""
    counted, found = analysis.counted, analysis.matches
    boxes, positions = boxes_by_class(counted), positions_by_class(counted, found.counts)
    every = [(found.counts, sum(boxes)), *((positions[k], boxes[k]) for k in classes)]
    return [_curve(counted.score[chosen], found.right[chosen], number) for chosen, number in every]


def _curve(
    score: Float64[np.ndarray, " D"], right: Bool[np.ndarray, " D"], boxes: int
) -> tuple[Float64[np.ndarray, " 101"], Float64[np.ndarray, " 101"]]:
    """NaN where there is no detection, or no box."""
    order = np.argsort(score)
    start = np.searchsorted(score[order], THRESHOLDS)
    found = np.append(np.cumsum(right[order][::-1])[::-1], 0)[start]
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / (len(score) - start), found / np.float64(boxes)

"""COCO's metric as pycocotools counts it: the reference for `coco_metric`, slower by two orders of magnitude."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deperceiver_jax.evaluation.coco_metric import FINER_BOUNDS, STATISTICS

EVERYTHING = 1e5**2


def reference(truth: dict, results: list[dict], *, max_detections: int = 100, area_scale: float = 1.0) -> dict:
    """What `coco_metric` gives for the same arguments, read from pycocotools' tables and matches."""
    edges = [0, *(side**2 * area_scale for side in FINER_BOUNDS), EVERYTHING]
    small, large = 32**2 * area_scale, 96**2 * area_scale
    areas = {"all": [0, EVERYTHING], "small": [0, small], "medium": [small, large], "large": [large, EVERYTHING]}
    areas |= {n: [low, high] for n, (low, high) in enumerate(zip(edges, edges[1:], strict=False))}
    limits = sorted({min(n, max_detections) for n in (1, 10, 100)} | {max_detections})
    truth, results, ids = numbered(truth, results)
    run = count(truth, results, limits, areas)

    def mean(table, area="all", limit=limits[-1], iou=slice(None), class_=slice(None)):
        values = run.eval[table][..., class_, list(areas).index(area), limits.index(limit)][iou]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    metrics = {}
    for name, (table, iou, area, detections) in STATISTICS.items():
        limit = limits[-1] if detections is None else min(detections, limits[-1])
        metrics[name] = mean(table, area, limit, slice(None) if iou is None else [0, 5][iou == 0.75])
    metrics["APs_over_AP"] = metrics["APs"] / metrics["AP"] if metrics["AP"] > 0 and metrics["APs"] >= 0 else -1.0

    real = [a for a in truth["annotations"] if not a["iscrowd"]]
    metrics["by_class"] = []
    for k, category in enumerate(sorted(truth["categories"], key=lambda c: c["id"])):
        boxes = sum(a["category_id"] == category["id"] for a in real)
        row = {"category_id": ids[category["id"]], "name": category["name"], "boxes": boxes}
        row |= {"AP": mean("precision", class_=k), "AP50": mean("precision", iou=0, class_=k)}
        row |= {f"AP{area[0]}": mean("precision", area, class_=k) for area in ("small", "medium", "large")}
        metrics["by_class"].append(row | {"AR": mean("recall", class_=k)} | threshold(run, category["id"], boxes))
    metrics["by_size"] = []
    for n, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        sides = {"from": math.sqrt(low), "to": None if high == EVERYTHING else math.sqrt(high)}
        counts = {"boxes": sum(low <= a["area"] <= high for a in real)}
        metrics["by_size"].append(sides | counts | {"AP": mean("precision", n), "AR": mean("recall", n)})
    return metrics


def assert_same(found, expected) -> None:
    """Numbers to 1e-12, everything else exactly, and in the same order."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == (pytest.approx(expected, rel=0, abs=1e-12) if isinstance(expected, float) else expected)


def numbered(truth, results):
    """(truth, results, ids by number): both with small ids, since pycocotools handles ids as doubles."""
    images, categories = (
        {id: number for number, id in enumerate(sorted(item["id"] for item in truth[key]), 1)}
        for key in ("images", "categories")
    )

    def renamed(entries):
        return [
            e | {"image_id": images[e["image_id"]], "category_id": categories[e["category_id"]]}
            for e in entries
            if e["image_id"] in images and e["category_id"] in categories
        ]

    small = {
        "images": [image | {"id": images[image["id"]]} for image in truth["images"]],
        "categories": [category | {"id": categories[category["id"]]} for category in truth["categories"]],
        "annotations": renamed(truth["annotations"]),
    }
    return truth | small, renamed(results), {number: id for id, number in categories.items()}


def count(truth, results, limits, areas) -> COCOeval:
    def index(annotations):
        coco = COCO()
        coco.dataset = truth | {"annotations": [dict(a) for a in annotations]}
        coco.createIndex()
        return coco

    found = [r | {"id": n, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for n, r in enumerate(results, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(index(truth["annotations"]), index(found), "bbox")
        run.params.maxDets = limits
        run.params.areaRng, run.params.areaRngLbl = list(areas.values()), list(map(str, areas))
        run.evaluate()
        run.accumulate()
    return run


def threshold(run, category: int, boxes: int) -> dict:
    """Every score of a class tried as the threshold, over pycocotools' matches at IoU 0.5."""
    if not boxes:
        return {"threshold": None, "F1": -1.0, "precision": -1.0, "recall": -1.0}
    scores, right = [], []
    for image in run.evalImgs:
        if image and image["category_id"] == category and image["aRng"] == [0, EVERYTHING]:
            for score, match, ignore in zip(
                image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True
            ):
                if not ignore:
                    scores.append(score)
                    right.append(match > 0)
    if not any(right):
        return {"threshold": None, "F1": 0.0, "precision": 0.0, "recall": 0.0}
    scores, right = np.array(scores), np.array(right)
    best = None
    for least in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= least
        precision, recall = float(right[taken].mean()), float(right[taken].sum() / boxes)
        f1 = 2 * int(right[taken].sum()) / (int(taken.sum()) + boxes)
        if best is None or f1 > best["F1"]:
            best = {"threshold": least, "F1": f1, "precision": precision, "recall": recall}
    return best

"""COCO's detection metric: ground truth and detections of one split -> AP, its relatives, and the paper's APs / AP.

The counting is done by hotcoco; the statistics are read from its tables of precision and recall. The tests hold them
against pycocotools, the reference.
"""

import math
from collections.abc import Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import NamedTuple

import hotcoco
import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from deperceiver_jax.structures import Detections

# name: (table, IoU threshold or None for the mean over 0.50:0.95, area range, detections or None for all that count)
STATISTICS = {
    "AP": ("precision", None, "all", None),
    "AP50": ("precision", 0.5, "all", None),
    "AP75": ("precision", 0.75, "all", None),
    "APs": ("precision", None, "small", None),
    "APm": ("precision", None, "medium", None),
    "APl": ("precision", None, "large", None),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "ARs": ("recall", None, "small", None),
    "ARm": ("recall", None, "medium", None),
    "ARl": ("recall", None, "large", None),
}
SUMMARY = (*STATISTICS, "APs_over_AP")
AREAS = ("all", "small", "medium", "large")
BOUNDS = (32, 96)  # side of a square between small, medium and large, in pixels
FINER_BOUNDS = (16, 32, 64, 96, 192)
EVERYTHING = 1e5  # side of a square that is larger than any box, as pycocotools has it
MATCH_IOU = 0.5  # from which on a detection is right, where one threshold is asked for


def ground_truth(source) -> dict:
    """Every annotation of a split in COCO's layout: unclipped boxes, crowds and areas as the data set has them.

    Annotations are numbered anew from 1, because pycocotools takes a match with number 0 for no match.
    """
    images = []
    annotations: list[dict] = []
    for i, image_id in enumerate(np.asarray(source.image_ids).tolist()):
        height, width = np.asarray(source.sizes[i]).tolist()
        images.append({"id": image_id, "height": height, "width": width})
        a = source.annotations(i)
        columns = (np.asarray(c).tolist() for c in (a.boxes, a.category_id, a.is_crowd, a.area))
        for box, category, crowd, area in zip(*columns, strict=True):
            number = len(annotations) + 1
            entry = {"id": number, "image_id": image_id, "category_id": category, "bbox": box}
            annotations.append(entry | {"area": area, "iscrowd": int(crowd)})
    classes = zip(np.asarray(source.classes.category_ids).tolist(), source.classes.names, strict=True)
    categories = [{"id": category, "name": name} for category, name in classes]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_results(detections: Detections, image_ids, classes, score_threshold: float = 0.0) -> list[dict]:
    """COCO's results format: image_id, category_id, bbox (left, top, width, height in pixels) and score of each box.

    `detections` are NumPy arrays whose rows belong to `image_ids`. A score below `score_threshold` is left out, and so
    is a class slot that stands for no category of the data set (COCO's 91 slots hold 80), which no metric counts.
    """
    slots = np.asarray(classes.slots)
    category_of = dict(zip(slots.tolist(), np.asarray(classes.category_ids).tolist(), strict=True))
    low, high = detections.boxes[..., :2], detections.boxes[..., 2:]
    boxes = np.concatenate([low, high - low], axis=-1)
    kept = np.isin(detections.labels, slots) & (detections.scores >= score_threshold)
    ids = [int(image_id) for image_id in image_ids]
    columns = (np.nonzero(kept)[0], detections.labels[kept], boxes[kept], detections.scores[kept])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {"image_id": ids[row], "category_id": category_of[slot], "bbox": box, "score": score}
        for row, slot, box, score in rows
    ]


class Counted(NamedTuple):
    """A split counted at COCO's IoU thresholds and areas, and what it was counted from.

    Images and categories have numbers from 1, in ascending order of the data set's own ids; so have `run`'s. Boxes
    are those of `results` that are of an image and a category of `truth`, numbered from 1 in their order.
    """

    run: hotcoco.COCOeval  # evaluated and accumulated
    truth: hotcoco.COCO
    found: hotcoco.COCO
    classes: list[dict]  # of the data set: id and name, in ascending order of id
    crowd: Bool[np.ndarray, " A"]  # of every annotation; the others are boxes to find
    box_class: Int[np.ndarray, " A"]  # its class's position in `classes`
    box_area: Float64[np.ndarray, " A"]
    found_class: Int[np.ndarray, " D"]  # of every detection
    score: Float64[np.ndarray, " D"]
    area_scale: float


def count(truth: dict, results: list[dict], *, max_detections: int = 100, area_scale: float = 1.0) -> Counted:
    """Matches detections with ground truth; arguments as those of `coco_metric`.

    What `results` has of an image or a category that `truth` does not list counts nowhere. hotcoco takes no negative
    ids, and its results no integer that a double cannot hold: hence the numbers.
    """
    images, categories = (
        {id: number for number, id in enumerate(sorted(item["id"] for item in truth[key]), 1)}
        for key in ("images", "categories")
    )

    def columns(entries, *more):
        """image, category, boxes and `more` of those entries that count."""

        def column(values, kind, each=1):
            return np.fromiter(values, kind, each * len(entries))

        image = column(map(images.get, map(itemgetter("image_id"), entries), repeat(0)), int)
        category = column(map(categories.get, map(itemgetter("category_id"), entries), repeat(0)), int)
        boxes = column(chain.from_iterable(map(itemgetter("bbox"), entries)), float, 4).reshape(-1, 4)
        known = (image > 0) & (category > 0)
        others = (column(map(itemgetter(key), entries), float) for key in more)
        return [values[known] for values in (image, category, boxes, *others)]

    image, category, boxes, area, crowd = columns(truth["annotations"], "area", "iscrowd")
    crowd = crowd.astype(bool)
    classes = sorted(truth["categories"], key=lambda item: item["id"])
    index = hotcoco.COCO.from_arrays(
        [item | {"id": images[item["id"]]} for item in truth["images"]],
        [item | {"id": number} for number, item in enumerate(classes, 1)],
        *(image, category, boxes),
        area=area,
        iscrowd=crowd,
    )
    image, found_class, boxes, score = columns(results, "score")
    found = index.load_res(np.column_stack([image, boxes, score, found_class]))
    limits = sorted({min(n, max_detections) for n in (1, 10, 100)} | {max_detections})
    run = _run(index, found, [(0, EVERYTHING), *_between(BOUNDS)], AREAS, limits, area_scale)
    return Counted(run, index, found, classes, crowd, category - 1, area, found_class - 1, score, area_scale)


def _between(bounds: Sequence[float]) -> list[tuple[float, float]]:
    """The ranges of sides that `bounds` cut all boxes into."""
    return list(zip((0, *bounds), (*bounds, EVERYTHING), strict=True))


def _area(side: float, area_scale: float) -> float:
    return EVERYTHING**2 if side == EVERYTHING else side**2 * area_scale


def _run(truth, found, sides, labels, limits, area_scale) -> hotcoco.COCOeval:
    """Everything matched and accumulated; sides: from and to, of a square, by area range."""
    run = hotcoco.COCOeval(truth, found, "bbox")
    run.params.max_dets = limits
    run.params.area_rng = [[_area(side, area_scale) for side in pair] for pair in sides]
    run.params.area_rng_lbl = list(labels)
    run.evaluate()
    run.accumulate()
    return run


def precision_table(counted: Counted) -> Float64[np.ndarray, "I R C"]:
    """Precision by IoU threshold (0.5, 0.55 .. 0.95), recall (0, 0.01 .. 1) and class; -1 for classes without boxes."""
    return _tables(counted.run)["precision"][..., 0, -1]


def _tables(run: hotcoco.COCOeval) -> dict:
    """precision [IoU, recall, class, area, detections] and recall, without its second axis; -1: no box to find."""
    assert run.eval is not None, "not accumulated"
    return run.eval


def coco_metric(truth: dict, results: list[dict], *, max_detections: int = 100, area_scale: float = 1.0) -> dict:
    """The twelve statistics of COCO and APs_over_AP, each in [0, 1], or -1 where COCO leaves it undefined; and
    `by_class` and `by_size`, lists of rows (`class_rows`, `size_rows`).

    truth: from `ground_truth`. results: from `coco_results`; among equal scores the earlier one comes first.
    max_detections: how many of an image's detections of one category count. COCO's tables count 100, which lets an
      image have many more in all. Above 100, AP, its IoU and area kinds, and the recall by area count so many; AR1,
      AR10 and AR100 stay what their names say. Below 100, none counts more than that.
    area_scale: multiplies 32 x 32 and 96 x 96 square pixels, the bounds between small, medium and large; for data sets
      whose images are not the size of COCO's.
    A statistic is -1 when the split has no object it speaks of; APs_over_AP also when AP is 0.
    """
    counted = count(truth, results, max_detections=max_detections, area_scale=area_scale)
    return summary(counted) | {"by_class": class_rows(counted), "by_size": size_rows(counted)}


def summary(counted: Counted) -> dict[str, float]:
    """The statistics of `coco_metric`, without its lists."""
    tables = _tables(counted.run)
    metrics = {name: _statistic(counted.run, tables, *what) for name, what in STATISTICS.items()}
    metrics["APs_over_AP"] = metrics["APs"] / metrics["AP"] if metrics["AP"] > 0 and metrics["APs"] >= 0 else -1.0
    return metrics


def _statistic(run, tables, table: str, iou: float | None, area: str, detections: int | None) -> float:
    limits = run.params.max_dets
    limit = limits[-1] if detections is None else min(detections, limits[-1])
    values = tables[table][..., AREAS.index(area), limits.index(limit)]
    if iou is not None:
        values = values[np.isclose(run.params.iou_thrs, iou)]
    return _mean(values)


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """Over IoU thresholds, recall points and classes; entries of -1 are classes without a box to find."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def class_rows(counted: Counted) -> list[dict]:
    """A row a category, in ascending order of id: its number of boxes (crowds left out), AP and its kinds, AR, and
    the score from which on detections have the best F1, with F1, precision and recall there.

    AR counts as many detections of an image as AP does. The threshold is None where no detection is right at IoU 0.5.
    """
    tables, half = _tables(counted.run), np.isclose(counted.run.params.iou_thrs, MATCH_IOU)
    precision, recall = tables["precision"][..., -1], tables["recall"][..., -1]
    right, counts, _ = matches(counted)
    of_class = positions_by_class(counted, counts)
    boxes = np.bincount(counted.box_class[~counted.crowd], minlength=len(counted.classes)).tolist()
    rows = []
    for k, item in enumerate(counted.classes):
        row = {"category_id": item["id"], "name": item["name"], "boxes": boxes[k]}
        row |= {"AP": _mean(precision[:, :, k, 0]), "AP50": _mean(precision[half, :, k, 0])}
        row |= {f"AP{area[0]}": _mean(precision[:, :, k, AREAS.index(area)]) for area in AREAS[1:]}
        best = best_threshold(counted.score[of_class[k]], right[of_class[k]], boxes[k])
        rows.append(row | {"AR": _mean(recall[:, k, 0])} | best)
    return rows


class Matches(NamedTuple):
    """What became of every detection and annotation, crowds included, at IoU 0.5, whatever the scores."""

    right: Bool[np.ndarray, " D"]  # the detection found a box of its class
    counts: Bool[np.ndarray, " D"]  # it is not on a crowd, and among as many of its image and class as count
    found_by: Int[np.ndarray, " A"]  # the annotation's detection; -1: none


def matches(counted: Counted) -> Matches:
    """Each detection takes the free box of its class that it covers best, those with the best scores first."""
    told = counted.run.image_diagnostics(iou_thr=MATCH_IOU, score_thr=math.inf)  # so that it seeks no label errors
    status, pairs = told["dt_status"], told["gt_match"]
    number = np.fromiter(status.keys(), int, len(status)) - 1
    counts, right = np.zeros(len(counted.score), bool), np.zeros(len(counted.score), bool)
    counts[number] = True
    right[number] = np.fromiter((value == "tp" for value in status.values()), bool, len(status))
    found_by = np.full(len(counted.crowd), -1)
    found_by[np.fromiter(pairs.keys(), int, len(pairs)) - 1] = np.fromiter(pairs.values(), int, len(pairs)) - 1
    return Matches(right, counts, found_by)


def positions_by_class(counted: Counted, chosen: Bool[np.ndarray, " D"]) -> list[Int[np.ndarray, " K"]]:
    """Of the chosen detections, those of each class, in their order."""
    positions = np.nonzero(chosen)[0]
    classes = counted.found_class[positions]
    order = np.argsort(classes, kind="stable")
    return np.split(positions[order], np.searchsorted(classes[order], np.arange(1, len(counted.classes))))


def best_threshold(score: Float64[np.ndarray, " D"], right: Bool[np.ndarray, " D"], boxes: int) -> dict:
    """The score from which on detections have the greatest F1, the higher one where two are as good.

    boxes: how many there are to find. Without any, F1, precision and recall are -1.
    """
    if not boxes:
        return {"threshold": None, "F1": -1.0, "precision": -1.0, "recall": -1.0}
    if not right.any():
        return {"threshold": None, "F1": 0.0, "precision": 0.0, "recall": 0.0}
    order = np.argsort(-score, kind="stable")
    score, found = score[order], np.cumsum(right[order])
    ends = np.append(score[1:] != score[:-1], True)  # a threshold takes all of equal scores or none
    score, found, taken = score[ends], found[ends], np.nonzero(ends)[0] + 1
    f1 = 2 * found / (taken + boxes)
    best = int(f1.argmax())
    precision, recall = found[best] / taken[best], found[best] / boxes
    return {
        "threshold": float(score[best]),
        "F1": float(f1[best]),
        "precision": float(precision),
        "recall": float(recall),
    }


def size_rows(counted: Counted) -> list[dict]:
    """A row a range of sizes, finer than COCO's: sides of a square of the objects' area, `from` and `to` (None: any),
    in pixels; the number of boxes, AP and AR."""
    sides = _between(FINER_BOUNDS)
    limit = counted.run.params.max_dets[-1]
    run = _run(counted.truth, counted.found, sides, [str(low) for low, _ in sides], [limit], counted.area_scale)
    tables = _tables(run)
    area, scale = counted.box_area[~counted.crowd], math.sqrt(counted.area_scale)
    rows = []
    for n, ((low, high), (least, most)) in enumerate(zip(sides, run.params.area_rng, strict=True)):
        row = {"from": low * scale, "to": None if high == EVERYTHING else high * scale}
        row["boxes"] = int(((area >= least) & (area <= most)).sum())
        rows.append(row | {"AP": _mean(tables["precision"][..., n, 0]), "AR": _mean(tables["recall"][..., n, 0])})
    return rows


def metric_table(metrics: dict[str, float], max_detections: int = 100) -> str:
    """The twelve lines that every COCO evaluation prints, and the line behind the paper's figure 3."""
    lines = []
    for name, (table, iou, area, detections) in STATISTICS.items():
        title, short = ("Average Precision", "(AP)") if table == "precision" else ("Average Recall", "(AR)")
        threshold = "0.50:0.95" if iou is None else f"{iou:0.2f}"
        limit = max_detections if detections is None else min(detections, max_detections)
        place = f"IoU={threshold:<9} | area={area:>6} | maxDets={limit:>3}"
        lines.append(f" {title:<18} {short} @[ {place} ] = {metrics[name]:0.3f}")
    lines.append(f" {'APs / AP':<70} = {metrics['APs_over_AP']:0.3f}")
    return "\n".join(lines)

"""COCO's detection metric: ground truth and detections of one split -> AP, its relatives, and the paper's APs / AP.

The counting is done by faster-coco-eval, or by pycocotools, the reference, which is slower and gives the same numbers;
the statistics are read from their precision and recall tables here, so both are summarised by the same code.
"""

import contextlib
import io

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from deperceiver_jax.structures import Detections

BACKENDS = {
    "faster_coco_eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
    "pycocotools": (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval),
}

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


def ground_truth(source) -> dict:
    """Every annotation of a split in COCO's layout: unclipped boxes, crowds and areas as the data set has them.

    Annotations are numbered anew from 1, because both evaluators take a match with number 0 for no match.
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
    categories = dict(zip(np.asarray(classes.slots).tolist(), np.asarray(classes.category_ids).tolist(), strict=True))
    low, high = detections.boxes[..., :2], detections.boxes[..., 2:]
    boxes = np.concatenate([low, high - low], axis=-1)
    results = []
    rows = zip(image_ids, boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True)
    for image_id, image_boxes, labels, scores in rows:
        for box, slot, score in zip(image_boxes, labels, scores, strict=True):
            if slot in categories and score >= score_threshold:
                category = categories[slot]
                results.append({"image_id": int(image_id), "category_id": category, "bbox": box, "score": score})
    return results


def coco_metric(
    truth: dict,
    results: list[dict],
    *,
    max_detections: int = 100,
    area_scale: float = 1.0,
    backend: str = "faster_coco_eval",
) -> dict[str, float]:
    """The twelve statistics of COCO and APs_over_AP, each in [0, 1], or -1 where COCO leaves it undefined.

    truth: from `ground_truth`. results: from `coco_results`; among equal scores the earlier one comes first.
    max_detections: how many of an image's detections of one category count. COCO's tables count 100, which lets an
      image have many more in all. Above 100, AP, its IoU and area kinds, and the recall by area count so many; AR1,
      AR10 and AR100 stay what their names say. Below 100, none counts more than that.
    area_scale: multiplies 32 x 32 and 96 x 96 square pixels, the bounds between small, medium and large; for data sets
      whose images are not the size of COCO's.
    A statistic is -1 when the split has no object it speaks of; APs_over_AP also when AP is 0.
    """
    coco, evaluator = BACKENDS[backend]
    truth, results = _numbered(truth, results)
    with contextlib.redirect_stdout(io.StringIO()):  # both report their progress there
        run = evaluator(
            _indexed(coco, truth), _indexed(coco, truth | {"annotations": _as_annotations(results)}), "bbox"
        )
        run.params.maxDets = sorted({min(n, max_detections) for n in (1, 10, 100)} | {max_detections})
        small, large = 32**2 * area_scale, 96**2 * area_scale
        everything = 1e5**2
        run.params.areaRng = [[0, everything], [0, small], [small, large], [large, everything]]
        run.params.areaRngLbl = ["all", "small", "medium", "large"]
        run.evaluate()
        run.accumulate()
    metrics = {name: _statistic(run, *what) for name, what in STATISTICS.items()}
    metrics["APs_over_AP"] = metrics["APs"] / metrics["AP"] if metrics["AP"] > 0 and metrics["APs"] >= 0 else -1.0
    return metrics


def _numbered(truth: dict, results: list[dict]) -> tuple[dict, list[dict]]:
    """Both with images and categories numbered from 1 in ascending order of their ids.

    Both evaluators handle ids as doubles, in which hashes above 2^53 become equal. What `results` has of an image or a
    category that `truth` does not list counts nowhere and is left out.
    """
    images, categories = (
        {id: number for number, id in enumerate(sorted(item["id"] for item in truth[key]), 1)}
        for key in ("images", "categories")
    )

    def renumbered(entries):
        return [
            entry | {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}
            for entry in entries
            if entry["image_id"] in images and entry["category_id"] in categories
        ]

    numbered = {
        "images": [image | {"id": images[image["id"]]} for image in truth["images"]],
        "categories": [category | {"id": categories[category["id"]]} for category in truth["categories"]],
        "annotations": renumbered(truth["annotations"]),
    }
    return truth | numbered, renumbered(results)


def _indexed(coco, dataset: dict):
    """The library's own index over a data set in memory; the annotations are copied, since evaluating marks them."""
    index = coco()
    index.dataset = dataset | {"annotations": [dict(a) for a in dataset["annotations"]]}
    index.createIndex()
    return index


def _as_annotations(results: list[dict]) -> list[dict]:
    """What the libraries' loadRes adds to results; theirs fails when there are none."""
    return [
        r | {"id": number, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for number, r in enumerate(results, 1)
    ]


def _statistic(run, table: str, iou: float | None, area: str, detections: int | None) -> float:
    """Mean over IoU thresholds, recall points and classes; -1 entries are classes without a box to find."""
    limits = run.params.maxDets
    limit = limits[-1] if detections is None else min(detections, limits[-1])
    values = np.asarray(run.eval[table])[..., run.params.areaRngLbl.index(area), limits.index(limit)]
    if iou is not None:
        values = values[np.isclose(run.params.iouThrs, iou)]
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


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

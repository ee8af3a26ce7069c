"""The metric against pycocotools itself, and on splits small enough to know the answer."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deperceiver_jax.evaluation.coco_metric import (
    STATISTICS,
    SUMMARY,
    coco_metric,
    coco_results,
    ground_truth,
    metric_table,
)
from deperceiver_jax.structures import Detections
from tests.evaluation.coco_oracle import assert_same, reference
from tests.evaluation.conftest import random_results, random_source

ORDER = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def run_pycocotools(tmp_path, truth, results, max_detections=100):
    """What a person does with two files and pycocotools' documentation; returns its twelve `stats`."""
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "detections.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        run = COCOeval(coco, coco.loadRes(str(tmp_path / "detections.json")), "bbox")
        run.params.maxDets = [1, 10, max_detections]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def test_equals_a_direct_pycocotools_run(tmp_path, source, results):
    truth = ground_truth(source)
    assert any(a["iscrowd"] for a in truth["annotations"])
    metrics = coco_metric(truth, results)
    expected = run_pycocotools(tmp_path, truth, results).stats
    assert list(STATISTICS) == ORDER
    np.testing.assert_allclose([metrics[name] for name in ORDER], expected, rtol=0, atol=1e-12)
    assert all(0 < metrics[name] < 1 for name in ORDER)
    assert metrics["APs_over_AP"] == metrics["APs"] / metrics["AP"]
    assert_same(metrics, reference(truth, results))


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_reference_on_random_splits(seed):
    """Crowds, ties, classes that have no box or no detection, boxes without area, images full of one class."""
    source = random_source(seed + 10, images=30)
    if seed % 2:
        for categories in source.categories:
            categories[categories == 7] = 3
    truth, results = ground_truth(source), random_results(source, seed)
    rng = np.random.default_rng(seed)
    results = [r for r in results if r["category_id"] != 40 or seed % 3]
    for box in rng.uniform([0, 0, 0, 0], [600, 440, 90, 90], (150, 4)).round(1).tolist():
        crowded = {"image_id": int(source.image_ids[0]), "category_id": 3, "bbox": box}
        results.append(crowded | {"score": float(rng.integers(1, 10)) / 10})
    results[5]["bbox"] = [10.0, 10.0, 0.0, 5.0]
    for limits in ({}, {"max_detections": 120}, {"max_detections": 7}, {"area_scale": 1 / 7}):
        assert_same(coco_metric(truth, results, **limits), reference(truth, results, **limits))


def test_more_than_100_detections_of_one_category(tmp_path, source):
    """One category, hundreds of false boxes: a limit of 300 finds boxes that 100 does not, as in pycocotools."""
    for i in range(len(source)):
        source.categories[i] = np.full(len(source.boxes[i]), 7)
    rng = np.random.default_rng(3)
    truth, results = ground_truth(source), []
    for i, image_id in enumerate(source.image_ids.tolist()):
        boxes = np.concatenate([rng.uniform(5, 400, (250, 4)), source.boxes[i]])
        scores = rng.uniform(size=len(boxes)).tolist()
        for box, score in zip(boxes.tolist(), scores, strict=True):
            results.append({"image_id": image_id, "category_id": 7, "bbox": box, "score": score})

    standard, wide = (coco_metric(truth, results, max_detections=n) for n in (100, 300))
    assert_same(wide, reference(truth, results, max_detections=300))
    direct = run_pycocotools(tmp_path, truth, results, max_detections=300)
    # pycocotools' own summary insists on 100 for AP, so its tables are read; the area kinds are as it prints them.
    precision = direct.eval["precision"][:, :, :, 0, 2]
    assert wide["AP"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    assert wide["AP50"] == pytest.approx(direct.stats[1], abs=1e-12)
    assert wide["ARl"] == pytest.approx(direct.stats[11], abs=1e-12)
    assert wide["AP"] > standard["AP"]
    assert {k: wide[k] for k in ("AR1", "AR10", "AR100")} == {k: standard[k] for k in ("AR1", "AR10", "AR100")}


def test_fewer_detections_than_ten(source, results):
    metrics = coco_metric(ground_truth(source), results, max_detections=5)
    assert_same(metrics, reference(ground_truth(source), results, max_detections=5))
    assert metrics["AR10"] == metrics["AR100"] > metrics["AR1"]


def test_no_detections_is_zero(source):
    metrics = coco_metric(ground_truth(source), [])
    assert {metrics[name] for name in ORDER} == {0.0}
    assert metrics["APs_over_AP"] == -1.0
    assert {(row["threshold"], row["F1"]) for row in metrics["by_class"]} == {(None, 0.0)}


def test_nothing_to_find_is_minus_one(source, results):
    for i in range(len(source)):
        source.boxes[i], source.categories[i] = np.zeros((0, 4)), np.zeros(0, np.int64)
        source.crowds[i] = np.zeros(0, bool)
    metrics = coco_metric(ground_truth(source), results)
    assert {metrics[name] for name in SUMMARY} == {-1.0}
    assert {(row["boxes"], row["AP"], row["F1"]) for row in metrics["by_class"]} == {(0, -1.0, -1.0)}
    assert {(row["boxes"], row["AP"], row["AR"]) for row in metrics["by_size"]} == {(0, -1.0, -1.0)}
    json.loads(json.dumps(metrics, allow_nan=False))


def test_perfect_detections(source):
    """Every box found exactly; crowds need not be, and an annotation numbered 0 would be lost by pycocotools."""
    truth = ground_truth(source)
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    metrics = coco_metric(truth, results)
    assert metrics["AP"] == metrics["APs"] == metrics["APl"] == metrics["AR100"] == 1.0
    assert metrics["APs_over_AP"] == 1.0
    assert {(row["AP"], row["threshold"], row["F1"]) for row in metrics["by_class"]} == {(1.0, 0.9, 1.0)}
    assert [row["from"] for row in metrics["by_size"]] == [0, 16, 32, 64, 96, 192]
    assert sum(row["boxes"] for row in metrics["by_size"]) == len(results)


def test_the_threshold_takes_equal_scores_together():
    """Two boxes of one class: at 0.9 a right and a wrong one, at 0.5 the other; at 0.1 only wrong ones."""
    images = [{"id": 1, "height": 100, "width": 100}]
    boxes = [[10, 10, 20, 20], [60, 60, 20, 20]]
    truth = {"images": images, "categories": [{"id": 5, "name": "ant"}]}
    entry = {"image_id": 1, "category_id": 5}
    truth["annotations"] = [entry | {"id": n, "bbox": box, "area": 400, "iscrowd": 0} for n, box in enumerate(boxes, 1)]
    found = [(boxes[0], 0.9), ([0, 60, 20, 20], 0.9), (boxes[1], 0.5), ([60, 0, 20, 20], 0.1)]
    results = [entry | {"bbox": box, "score": score} for box, score in found]
    (row,) = coco_metric(truth, results)["by_class"]
    assert (row["boxes"], row["threshold"], row["F1"]) == (2, 0.5, 4 / 5)
    assert (row["precision"], row["recall"]) == (2 / 3, 1.0)


def test_area_scale_moves_the_bounds(source, results):
    """The same split at a quarter of the size, with the bounds scaled by 1/16, has the same statistics."""
    whole = coco_metric(ground_truth(source), results)
    source.boxes = [b / 4 for b in source.boxes]
    quarter = [r | {"bbox": (np.array(r["bbox"]) / 4).tolist()} for r in results]
    truth = ground_truth(source)
    scaled = coco_metric(truth, quarter, area_scale=1 / 16)
    for row in scaled["by_size"]:
        row |= {"from": row["from"] * 4, "to": row["to"] and row["to"] * 4}
    assert_same(scaled, whole)
    assert coco_metric(truth, quarter)["APs"] != pytest.approx(whole["APs"], abs=1e-3)


def test_ids_of_any_size_and_sign(source, results):
    """Hashes that are one and the same as doubles, and negative ids, give what small ids give."""
    expected = coco_metric(ground_truth(source), results)
    hashes = {id: 2**62 + id for id in source.image_ids.tolist()}
    categories = {3: -(2**60), 7: -(2**60) + 1, 8: 0, 40: 2**60}
    assert len({float(id) for id in hashes.values()}) == 1
    truth = ground_truth(source)
    for image in truth["images"]:
        image["id"] = hashes[image["id"]]
    for category in truth["categories"]:
        category["id"] = categories[category["id"]]
    for entry in [*truth["annotations"], *results]:
        entry["image_id"], entry["category_id"] = hashes[entry["image_id"]], categories[entry["category_id"]]
    stranger = {"image_id": 5, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 1.0}  # of no image: counts nowhere
    found = coco_metric(truth, [stranger, *results])
    assert [row["category_id"] for row in found["by_class"]] == sorted(categories.values())
    for row, before in zip(found["by_class"], expected["by_class"], strict=True):
        row["category_id"] = before["category_id"]
    assert_same(found, expected)


def test_results_have_category_ids_and_xywh(source):
    detections = Detections(
        scores=np.array([[0.75, 0.5, 0.25]], np.float32),
        labels=np.array([[7, 5, 40]], np.int32),  # slot 5 stands for no category
        boxes=np.array([[[-1, 2, 9, 12], [0, 0, 1, 1], [1, 1, 2, 3]]], np.float32),
    )
    results = coco_results(detections, [1234], source.classes)
    assert results == [
        {"image_id": 1234, "category_id": 7, "bbox": [-1.0, 2.0, 10.0, 10.0], "score": 0.75},
        {"image_id": 1234, "category_id": 40, "bbox": [1.0, 1.0, 1.0, 2.0], "score": 0.25},
    ]
    assert len(coco_results(detections, [1234], source.classes, score_threshold=0.5)) == 1


def test_table_is_the_familiar_one(tmp_path, source, results):
    """The twelve lines are those that pycocotools prints, character for character."""
    truth = ground_truth(source)
    run = run_pycocotools(tmp_path, truth, results)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run.summarize()
    lines = metric_table(coco_metric(truth, results)).splitlines()
    assert lines[:12] == printed.getvalue().splitlines()
    assert lines[12].startswith(" APs / AP") and len(lines) == 13

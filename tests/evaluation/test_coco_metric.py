"""The metric against pycocotools itself, and on splits small enough to know the answer."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deperceiver_jax.evaluation.coco_metric import (
    BACKENDS,
    STATISTICS,
    coco_metric,
    coco_results,
    ground_truth,
    metric_table,
)
from deperceiver_jax.structures import Detections

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_direct_pycocotools_run(tmp_path, source, results, backend):
    truth = ground_truth(source)
    assert any(a["iscrowd"] for a in truth["annotations"])
    metrics = coco_metric(truth, results, backend=backend)
    expected = run_pycocotools(tmp_path, truth, results).stats
    assert list(STATISTICS) == ORDER
    np.testing.assert_allclose([metrics[name] for name in ORDER], expected, rtol=0, atol=1e-12)
    assert all(0 < metrics[name] < 1 for name in ORDER)
    assert metrics["APs_over_AP"] == metrics["APs"] / metrics["AP"]


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
    reference = coco_metric(truth, results, max_detections=300, backend="pycocotools")
    assert wide == pytest.approx(reference, abs=1e-12)
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
    reference = coco_metric(ground_truth(source), results, max_detections=5, backend="pycocotools")
    assert metrics == pytest.approx(reference, abs=1e-12)
    assert metrics["AR10"] == metrics["AR100"] > metrics["AR1"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_is_zero(source, backend):
    metrics = coco_metric(ground_truth(source), [], backend=backend)
    assert {metrics[name] for name in ORDER} == {0.0}
    assert metrics["APs_over_AP"] == -1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_find_is_minus_one(source, results, backend):
    for i in range(len(source)):
        source.boxes[i], source.categories[i] = np.zeros((0, 4)), np.zeros(0, np.int64)
        source.crowds[i] = np.zeros(0, bool)
    metrics = coco_metric(ground_truth(source), results, backend=backend)
    assert set(metrics.values()) == {-1.0}
    json.loads(json.dumps(metrics, allow_nan=False))


def test_perfect_detections(source):
    """Every box found exactly; crowds need not be, and an annotation numbered 0 would be lost by both evaluators."""
    truth = ground_truth(source)
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    metrics = coco_metric(truth, results)
    assert metrics["AP"] == metrics["APs"] == metrics["APl"] == metrics["AR100"] == 1.0
    assert metrics["APs_over_AP"] == 1.0


def test_area_scale_moves_the_bounds(source, results):
    """The same split at a quarter of the size, with the bounds scaled by 1/16, has the same statistics."""
    whole = coco_metric(ground_truth(source), results)
    source.boxes = [b / 4 for b in source.boxes]
    quarter = [r | {"bbox": (np.array(r["bbox"]) / 4).tolist()} for r in results]
    truth = ground_truth(source)
    assert coco_metric(truth, quarter, area_scale=1 / 16) == pytest.approx(whole, abs=1e-12)
    assert coco_metric(truth, quarter)["APs"] != pytest.approx(whole["APs"], abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_any_size_and_sign(source, results, backend):
    """Hashes that are one and the same as doubles, and negative ids, give what small ids give."""
    expected = coco_metric(ground_truth(source), results, backend=backend)
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
    assert coco_metric(truth, [stranger, *results], backend=backend) == pytest.approx(expected, abs=1e-12)


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

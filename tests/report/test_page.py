"""The report's file: whole in itself, within its size, whatever the data are; what it counts beyond metrics.json."""

import json
import re

import numpy as np
import pytest

from deperceiver_jax import report
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import coco_metric, ground_truth
from deperceiver_jax.report import gallery, page
from deperceiver_jax.report.analysis import THRESHOLDS, analyse, threshold_curves
from deperceiver_jax.report.charts import MOST_CONFUSED, all_charts, confused_pairs
from tests.evaluation.conftest import random_results, random_source


def write(path, evaluated, **changes):
    values = {**vars(evaluated), **changes}
    names = ("source", "metrics", "results", "config")
    page.write_report(path, *(values[name] for name in names), split="validation", step="7")
    return path.read_text()


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_one_file_needs_no_other(tmp_path, evaluated):
    text = write(tmp_path / "report.html", evaluated)
    assert len(text.encode()) < 2_000_000
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.findall('(?:src|href)="(?!data:|#)', own) and "@import" not in own and "url(" not in own
    assert "<title>detr on coco_directory, validation, step 7</title>" in text
    pictures = data_of(text)["pictures"]
    assert {kind for picture in pictures for kind in picture["kinds"]} == {"worst", "best", "random", "class"}
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)


def test_pictures_make_room_for_the_rest(tmp_path, evaluated, monkeypatch):
    """The file keeps within its size with smaller pictures, and with fewer where the smallest are too large."""
    text = write(tmp_path / "report.html", evaluated)
    whole = sum(len(picture["src"]) for picture in data_of(text)["pictures"])
    monkeypatch.setattr(gallery, "SIDES", (512, 60, 30))
    for share in (0.9, 0.5):
        monkeypatch.setattr(page, "LARGEST", len(text.encode()) - int(whole * (1 - share)))
        small = write(tmp_path / "report.html", evaluated)
        assert len(small.encode()) <= page.LARGEST
    shown = [bool(picture["src"]) for picture in data_of(small)["pictures"]]
    assert any(shown) and not all(shown)


@pytest.mark.parametrize("found", [False, True])
def test_nothing_found_and_nothing_to_find(tmp_path, evaluated, found):
    """Of no detections, and of a split without boxes: every chart is made, and dashes stand for what is not defined."""

    class Empty:
        def __getattr__(self, name):
            return getattr(evaluated.source, name)

        def __len__(self):
            return len(evaluated.source)

        def annotations(self, i):
            return type(evaluated.source.annotations(i))(*(column[:0] for column in evaluated.source.annotations(i)))

    source = Empty() if found else evaluated.source
    results = evaluated.results if found else []
    metrics = coco_metric(ground_truth(source), results)
    text = write(tmp_path / "report.html", evaluated, source=source, results=results, metrics=metrics)
    assert f'<b data-metric="AP">{"–" if found else "0.000"}</b>' in text
    assert set(data_of(text)["charts"]) == {
        *("precision_recall", "sizes", "errors", "confusion", "calibration", "thresholds"),
    }


def test_names_are_text(tmp_path, evaluated, monkeypatch):
    """Names of classes and files that look like HTML are shown as they are, also two of the same name."""
    name = "</script><b>&"
    classes = type(evaluated.source.classes)((20, 30), (name, name), (0, 1), 2)
    monkeypatch.setattr(evaluated.source, "classes", classes)
    metrics = coco_metric(ground_truth(evaluated.source), evaluated.results)
    text = write(tmp_path / "report.html", evaluated, metrics=metrics)
    assert data_of(text)["classes"] == [f"{name} (20)", f"{name} (30)"]
    assert "<b>&" not in text.partition("<script>")[0] and "&lt;/script&gt;&lt;b&gt;&amp; (20)" in text


def test_what_cannot_be_written_or_read_is_a_sentence(tmp_path, evaluated, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/report.html cannot be written: File exists."):
        write(tmp_path / "file" / "report.html", evaluated)
    others = [row | {"image_id": row["image_id"] + 5000} for row in evaluated.results]
    with pytest.raises(UserError, match="other images than split validation has: of 5891"):
        write(tmp_path / "report.html", evaluated, results=others)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "altair" else object())
    with pytest.raises(UserError, match=r"--report needs altair: pip install '.\[report\]'."):
        report.require_libraries("--report")


# --------------------------------------------------------------------------------------------------- what is counted


@pytest.fixture(scope="module")
def random_split():
    source = random_source(images=30)
    truth, results = ground_truth(source), random_results(source)
    return truth, results, analyse(truth, results, max_detections=100, area_scale=1.0)


def test_threshold_curves_by_hand(random_split):
    """Precision and recall of every threshold, each counted anew."""
    truth, _, analysis = random_split
    counted, found = analysis.counted, analysis.matches
    of_all, of_third = threshold_curves(analysis, [2])
    for (precision, recall), k in ((of_all, None), (of_third, 2)):
        mine = found.counts & ((counted.found_class == k) if k is not None else True)
        boxes = sum(
            not a["iscrowd"] and (k is None or a["category_id"] == counted.classes[k]["id"])
            for a in truth["annotations"]
        )
        for n in (0, 10, 33, 50, 99):
            taken = mine & (counted.score >= THRESHOLDS[n])
            if taken.any():
                assert precision[n] == found.right[taken].mean()
            assert recall[n] == found.right[taken].sum() / boxes


def test_a_found_box_and_its_detection_lie_together(random_split):
    truth, results, analysis = random_split
    found = analysis.matches
    pairs = np.nonzero(found.found_by >= 0)[0]
    assert len(pairs) == found.right.sum() > 30
    for a in pairs.tolist():
        box, detection = truth["annotations"][a], results[found.found_by[a]]
        assert found.right[found.found_by[a]] and not box["iscrowd"]
        assert all(box[key] == detection[key] for key in ("image_id", "category_id"))
        left, right = np.array(box["bbox"]), np.array(detection["bbox"])
        sides = np.minimum(left[:2] + left[2:], right[:2] + right[2:]) - np.maximum(left[:2], right[:2])
        both = sides.clip(0).prod()
        assert both / (left[2:].prod() + right[2:].prod() - both) >= 0.5


def test_worst_and_best_pictures(random_split):
    """At the threshold, a worst picture is no better than any other, and a best one no worse."""
    truth, results, analysis = random_split
    position = {image["id"]: i for i, image in enumerate(truth["images"])}
    of_box = np.array([position[a["image_id"]] for a in truth["annotations"]])
    of_detection = np.array([position[r["image_id"]] for r in results])
    kinds = gallery.choose(analysis, of_box, of_detection, 30)
    f1 = {}
    for i in range(30):
        taken = [
            d
            for d in np.nonzero(of_detection == i)[0]
            if results[d]["score"] >= analysis.threshold and analysis.matches.counts[d]
        ]
        boxes = [a for a in np.nonzero(of_box == i)[0] if not truth["annotations"][a]["iscrowd"]]
        if taken or boxes:
            f1[i] = 2 * analysis.matches.right[taken].sum() / (len(taken) + len(boxes))
    worst, best = ([f1[i] for i, shown in kinds.items() if kind in shown] for kind in ("worst", "best"))
    assert len(worst) == len(best) == 10
    assert max(worst) <= sorted(f1.values())[10] and min(best) >= sorted(f1.values())[-11]


def test_confusion_and_calibration(evaluated):
    """Two boxes were called the other class: they stand in the list of pairs, and in the matrix."""
    truth = ground_truth(evaluated.source)
    low = [r | {"score": 0.9} if r["score"] >= 0.4 else r for r in evaluated.results]
    analysis = analyse(truth, low, max_detections=100, area_scale=1.0)
    pairs = {(row["true"], row["called"]): row["boxes"] for row in confused_pairs(analysis)}
    assert sum(pairs.values()) == 2
    charts = all_charts(analysis, evaluated.metrics["by_size"])
    rows = charts["confusion"]["data"]["values"]
    assert len(rows) == 9 and len(analysis.names) <= MOST_CONFUSED
    for name in analysis.names:
        assert sum(row["share"] for row in rows if row["true"] == name) == pytest.approx(1, abs=1e-3)
    for bar in charts["calibration"]["layer"][0]["data"]["values"]:
        low_end, high_end = bar["from"], bar["to"]
        score, counts = analysis.counted.score, analysis.matches.counts
        mine = counts & (score >= low_end) & ((score < high_end) | (high_end == 1))
        assert bar["detections"] == mine.sum()
        assert bar["right"] == pytest.approx(analysis.matches.right[mine].mean())

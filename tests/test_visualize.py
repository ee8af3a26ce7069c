"""Drawn boxes: where they are, that labels stay inside, that nothing depends on the size of the image."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax import visualize
from deperceiver_jax.command_line import run
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import coco_metric, ground_truth
from deperceiver_jax.evaluation.evaluate import write_results
from deperceiver_jax.training.workdir import read_config
from deperceiver_jax.visualize import (
    READABLE_SIDE,
    Comparison,
    class_color,
    compare,
    draw_detections,
    newest_evaluation,
    save_comparison,
)

NAMES = {0: "a rather long class name", 1: "cat", 5: "x"}.__getitem__


def gray(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def test_box_is_drawn_where_it_is():
    picture = draw_detections(gray(1000, 800), np.array([[100.0, 300, 500, 900]]), np.array([1]), None, NAMES)
    assert picture.shape == (1000, 800, 3) and picture.dtype == np.uint8
    color = np.array(class_color(1), np.uint8)
    rows, columns = np.nonzero((picture == color).all(-1))
    assert (columns.min(), columns.max(), rows.max()) == (100, 500, 900)
    np.testing.assert_array_equal(picture[600, 300], 128)  # only the outline
    np.testing.assert_array_equal(picture[600, 100], color)


def test_a_tiny_image_is_enlarged_before_drawing():
    picture = draw_detections(gray(96, 128), np.array([[32.0, 24, 64, 48]]), np.array([1]), np.array([0.5]), NAMES)
    assert picture.shape == (READABLE_SIDE * 96 // 128, READABLE_SIDE, 3)
    rows, columns = np.nonzero((picture == np.array(class_color(1), np.uint8)).all(-1))
    assert columns.min() == 128 and rows.max() == 192


@pytest.mark.parametrize("height, width", [(128, 128), (60, 900), (900, 60), (1, 1), (1333, 800)])
@pytest.mark.parametrize("corner", [(-0.5, -0.5), (0.9, 0.9), (-0.5, 0.9), (0.0, 0.0), (2.0, 2.0)])
def test_labels_stay_inside(height, width, corner, monkeypatch):
    """Every label's rectangle lies in the picture, for boxes at and beyond every border."""
    places, place = [], visualize._place
    monkeypatch.setattr(visualize, "_place", lambda *args: places.append(place(*args)) or places[-1])
    box = np.array([corner[0] * width, corner[1] * height, corner[0] * width + width, corner[1] * height + height])
    picture = draw_detections(gray(height, width), box[None].repeat(3, 0), np.array([0, 1, 5]), np.ones(3), NAMES)
    assert len(places) == 3
    for left, top, right, bottom in places:
        assert 0 <= left <= right < picture.shape[1] and 0 <= top <= bottom < picture.shape[0]


def test_labels_of_close_boxes_do_not_cover_one_another():
    boxes = np.array([[300.0, 300, 340, 340], [304, 302, 344, 342], [296, 304, 336, 344]])
    picture = draw_detections(gray(700, 700), boxes, np.array([0, 1, 5]), np.array([0.9, 0.8, 0.7]), NAMES)
    for label in (0, 1, 5):  # each background is seen, not only an outline of a few pixels
        assert (picture == np.array(class_color(label), np.uint8)).all(-1).sum() > 250


def test_colors_are_stable_and_apart():
    colors = [class_color(i) for i in range(91)]
    assert colors == [class_color(i) for i in range(91)] and len(set(colors)) == 91
    near = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors[:24]) for b in colors[:i]]
    assert min(near) > 40


def test_sheet_holds_all_pairs(tmp_path):
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    box = np.array([[10.0, 10, 60, 60]]), np.array([1]), np.array([0.9])
    rows = [Comparison(gray(128, 96), *box[:2], *box), Comparison(gray(64, 128), *none[:2], *none)]
    path = tmp_path / "new" / "sheet.png"
    save_comparison(path, rows[:1], NAMES, title="one")
    one = read(path)
    save_comparison(path, rows * 3, NAMES, title="six", note="step 3")
    six = read(path)
    assert one.shape[0] < six.shape[0] and one.shape[1] < six.shape[1]
    assert (six == np.array(class_color(1), np.uint8)).all(-1).sum() > 500


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def draw(*arguments):
    return run(visualize.main, ["visualize.py", *map(str, arguments)])


@pytest.fixture
def evaluated(tiny_run, tmp_path):
    """A copy of the run with two evaluations; the newer one found every rectangle exactly."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    source = open_source(read_config(workdir / "config.json").data, "validation")
    truth = ground_truth(source)
    metrics = coco_metric(truth, [])
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.75} for a in truth["annotations"]]
    write_results(workdir / "eval" / "3", metrics, [])
    write_results(workdir / "eval" / "20", metrics, [r | {"score": 0.25} for r in results] + results)
    return workdir


def test_sheet_of_a_run(evaluated, capsys):
    output = evaluated / "pictures" / "sheet.png"
    assert draw("detections", f"--workdir={evaluated}", f"--output={output}") == 0
    assert draw("detections", f"--workdir={evaluated}", f"--output={output}.png", "--images=1") == 0
    assert read(output).shape[0] > read(f"{output}.png").shape[0]


def test_what_a_run_found_is_compared_with_what_is_there(evaluated):
    source = open_source(read_config(evaluated / "config.json").data, "validation")
    assert newest_evaluation(evaluated) == evaluated / "eval" / "20"  # by number, not by spelling
    results = json.loads((evaluated / "eval" / "20" / "detections.json").read_text())
    rows = compare(source, results, range(len(source)), score_threshold=0.5)
    assert sum(len(row.boxes) for row in rows) == 9
    for row, size in zip(rows, source.sizes, strict=True):
        assert row.image.shape == (*size, 3)
        np.testing.assert_allclose(row.boxes, row.true_boxes)
        np.testing.assert_array_equal(row.labels, row.true_labels)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "python -m deperceiver_jax.visualize draws: detections"),
        (["attention"], "python -m deperceiver_jax.visualize draws: detections"),
        (["detections", "--output=a.png"], "--workdir is needed"),
        (["detections", "--workdir={0}"], "--output is needed"),
        (["detections", "--workdir={0}", "--output=a.gif"], "--output: a.gif must end in .png or .jpg."),
        (["detections", "--workdir={0}/none", "--output=a.png"], "{0}/none/config.json does not exist."),
        (["detections", "--workdir={0}", "--output=a.png"], "{0} has no evaluation; make one with: python eval.py"),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert draw(*(argument.format(tiny_run) for argument in arguments)) == 1
    assert capsys.readouterr().err.startswith("error: " + sentence.format(tiny_run))
    assert not list(tmp_path.iterdir())

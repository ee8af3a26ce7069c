"""Sheets of ground truth beside detections, and what a person can type wrongly."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import coco_metric, ground_truth
from deperceiver_jax.evaluation.evaluate import write_results
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.workdir import read_config
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.detections import Comparison, compare, newest_evaluation, save_comparison
from deperceiver_jax.visualize.draw_boxes import class_color

NAMES = {0: "a rather long class name", 1: "cat", 5: "x"}.__getitem__


def gray(height, width):
    return np.full((height, width, 3), 128, np.uint8)


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
        (["nothing"], "python -m deperceiver_jax.visualize draws: detections"),
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

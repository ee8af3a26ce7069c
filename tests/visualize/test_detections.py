"""Sheets of ground truth beside detections, and what a person can type wrongly."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import coco_metric, ground_truth
from deperceiver_jax.evaluation.evaluate import write_results
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.workdir import read_config
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.detections import Comparison, compare, newest_evaluation, save_comparison
from deperceiver_jax.visualize.draw_boxes import class_color
from deperceiver_jax.visualize.output import save_picture

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


@pytest.mark.parametrize("file", ["metrics.json", "detections.json"])
def test_an_evaluation_that_was_cut_is_named(evaluated, capsys, file):
    path = evaluated / "eval" / "20" / file
    path.write_text(path.read_text()[:-3])
    assert draw("detections", f"--workdir={evaluated}", f"--output={evaluated}/a.png") == 1
    assert f"error: {path} is not what an evaluation wrote" in capsys.readouterr().err
    path.unlink()
    path.mkdir()
    assert draw("detections", f"--workdir={evaluated}", f"--output={evaluated}/a.png") == 1
    assert f"error: {path} cannot be read: Is a directory." in capsys.readouterr().err


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="--output: .*/a.png cannot be written: No space left on device."):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "deep" / "a.png")
    assert not list((tmp_path / "deep").iterdir())


def test_ids_of_64_bits_are_told_apart():
    """Neighbours above 2^53, which are equal as doubles: each image gets its own detections."""
    ids = np.array([2**62, 2**62 + 1])
    png = cv2.imencode(".png", gray(8, 8))[1].tobytes()
    nothing = np.zeros((0, 4)), np.zeros(0, int)
    source = SimpleNamespace(
        image_ids=ids,
        classes=ClassMap.from_categories([(2**61, "a"), (2**61 + 1, "b")]),
        image_bytes=lambda i: png,
        orientation=lambda i: 1,
        targets=lambda i: nothing,
    )
    results = [{"image_id": id, "category_id": 2**61 + k, "bbox": [k, 0, 1, 1]} for k, id in enumerate(ids.tolist())]
    rows = compare(source, json.loads(json.dumps([r | {"score": 0.9} for r in results])), range(2), 0.5)
    assert [(row.labels.tolist(), row.boxes[:, 0].tolist()) for row in rows] == [([0], [0]), ([1], [1])]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "visualize draws detections, small_objects, layers,"),
        (["atention"], "visualize draws detections, small_objects, layers, queries, counting, attention, encoder, "),
        (["detections", "--output=a.png"], "--workdir is needed"),
        (["detections", "--workdir={0}"], "--output is needed"),
        (["detections", "--workdir={0}", "--output=a.gif"], "--output: a.gif must end in .png or .jpg."),
        (
            ["detections", "--workdir={0}", "--output={0}/config.json/a.png"],
            "--output: {0}/config.json/a.png cannot be",
        ),
        (["detections", "--workdir={0}", "--output=a.png", "--images=0"], "--images is 0; it must be at least 1."),
        (["detections", "--workdir={0}", "--output=a.png", "--score_threshold=40"], "--score_threshold is 40.0; it"),
        (
            ["latents", "--workdir={0}", "--example=0", "--output=a.png", "--score_threshold=40"],
            "--score_threshold is 40.0; it must",
        ),
        (["latents", "--workdir={0}", "--output={0}/config.json/a.png"], "--output: {0}/config.json/a.png cannot be"),
        (["attention", "--workdir={0}", "--output={0}/config.json/a.png"], "--output: {0}/config.json/a.png cannot be"),
        (["detections", "--workdir={0}/none", "--output=a.png"], "{0}/none does not exist."),
        (["detections", "--workdir={0}", "--output=a.png"], "{0} has no evaluation; make one with: deperceiver eval"),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert draw(*(argument.format(tiny_run) for argument in arguments)) == 1
    assert capsys.readouterr().err.startswith("error: " + sentence.format(tiny_run))
    assert not list(tmp_path.iterdir())

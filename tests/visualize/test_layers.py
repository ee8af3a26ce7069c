"""AP by decoder layer: the last row is eval.py's, suppression is as loops have it, doubles cost the first layer."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import SUMMARY
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step
from deperceiver_jax.evaluation.layers import SUPPRESSED, layer_metrics, suppress_overlaps
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.load_detector import load_for_command
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize import layers


def draw(*arguments):
    return run(visualize.main, ["visualize", "layers", *map(str, arguments)])


def overlap(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def suppressed_by_loops(boxes, scores, labels, iou):
    kept = []
    for k in np.argsort(-scores, kind="stable"):
        if all(labels[k] != labels[i] or overlap(boxes[k], boxes[i]) <= iou for i in kept):
            kept.append(k)
    return np.where(np.isin(np.arange(len(scores)), kept), labels, SUPPRESSED)


def test_suppression_is_what_loops_say():
    """Within a class alone, also of boxes that begin left of the image, which hold no class apart from another."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(-40, 20, (3, 80, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (3, 80, 2))], axis=-1).astype(np.float32)
    scores = rng.uniform(0.01, 1, (3, 80)).astype(np.float32)
    found = Detections(scores, rng.integers(0, 4, (3, 80)).astype(np.int32), boxes)
    for iou in (0.1, 0.4):
        expected = [suppressed_by_loops(*image, iou) for image in zip(boxes.astype(float), *found[:2], strict=True)]
        np.testing.assert_array_equal(suppress_overlaps(found, iou).labels, expected)
        assert 30 < (np.array(expected) == SUPPRESSED).sum() < 220


def test_doubles_cost_what_suppression_gives_back(rectangles):
    """The first layer finds every rectangle and then again, a little beside it; the second once."""
    source = open_source(rectangles, "validation")
    boxes, labels, scores = np.zeros((10, 2, 2, 4)), np.full((10, 2, 2), -1), np.full((10, 2, 2), 0.5)
    for i in range(len(source)):
        targets, classes = source.targets(i)
        for box, label in zip(targets, classes, strict=True):
            boxes[i], labels[i, 0], labels[i, 1, 0] = box, label, label
            boxes[i, 0, 1] += 2
            scores[i, 0] = 0.9 - 0.05 * i, 0.88 - 0.05 * i
    (alone, suppressed), (last, same) = layer_metrics(Detections(scores, labels, boxes), source, base(), 0.5)
    assert alone["AP50"] < 1 and suppressed["AP50"] == 1.0
    assert last["AP"] == 1.0 and same == last


def test_the_last_row_is_what_eval_measures(tiny_detr, tmp_path, monkeypatch, capsys):
    """One forward pass of the command against evaluate(): every statistic is equal, none nearly."""
    measured = []
    table = layers.table
    monkeypatch.setattr(layers, "table", lambda metrics: measured.extend(metrics) or table(metrics))
    output = tmp_path / "layers.png"
    assert draw(f"--weights={tiny_detr}", f"--output={output}") == 0, capsys.readouterr().err
    _, loaded = load_for_command(None, tiny_detr, "latest", ["test"])
    mesh = make_mesh()
    step = make_detect_step(loaded.skeleton.merge, loaded.config, mesh)
    source = open_source(loaded.config.data, "validation")
    metrics, _ = evaluate(step, jax.device_put(loaded.arrays), source, loaded.config, mesh)
    (first, _), (last, _) = measured
    assert {name: last[name] for name in SUMMARY} == {name: metrics[name] for name in SUMMARY}
    assert 0 < metrics["AP"] != first["AP"]
    assert f"{metrics['AP']:.3f}" in capsys.readouterr().out.splitlines()[2]
    with Image.open(output) as picture:
        assert picture.width > 600


def test_mistakes_are_one_sentence(tiny_run, tmp_path, capsys):
    def sentence(*arguments):
        assert draw(*arguments) == 1
        return capsys.readouterr().err

    output = f"--output={tmp_path}/a.png"
    assert "answers from 1 layer, and this picture needs 2 or more" in sentence(f"--workdir={tiny_run}", output)
    assert "--nms_iou is 2.0" in sentence(f"--workdir={tiny_run}", output, "--nms_iou=2")
    assert "--images is 0" in sentence(f"--workdir={tiny_run}", output, "--images=0")
    assert "--output is needed" in sentence(f"--workdir={tiny_run}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images", [1, 3])
def test_only_some_images(tiny_detr, tmp_path, images):
    """Spread evenly over the split."""
    values, rest = layers.parse_flags(
        ["x", f"--weights={tiny_detr}", f"--output={tmp_path}/a.png", f"--images={images}"], layers.define_flags, ""
    )
    subject = layers.open_subject(values, rest)
    assert len(subject.source) == images and f"{images} image" in subject.title

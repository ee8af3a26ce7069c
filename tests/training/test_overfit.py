"""config.train.overfit: a right set-up learns its images, and what hinders a wrong one is named. Real runs of train.py.

The backbone is the mean pixel of each cell, but where it is the question.
"""

import json
import signal

import cv2
import jax
import numpy as np
import pytest

import train as program
from configs import demo
from deperceiver_jax.data import open_source
from deperceiver_jax.program.command_line import run
from deperceiver_jax.report import __main__ as report_program
from deperceiver_jax.runs.workdir import read_config
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.training.overfit import few_pictures, train_on_few
from tests.drawn_arrays import Patches

pytestmark = pytest.mark.slow


def get_config(family="deperceiver_plus"):
    """The config file of these runs: a small detector for images of 64 to 96 pixels."""
    config = demo.get_config(family)
    config.data.name, config.data.train_split = "coco_directory", "validation"
    config.data.update(batch_size=16, eval_scale=64, eval_max_size=96)
    config.model.update(num_queries=6, embed_dim=32, strides=(8,), dropout=0.1)
    if family == "deperceiver_plus":
        config.model.denoising.copies = 0
    config.model.decoder.update(num_layers=2, num_heads=2, mlp_dim=32)
    config.matcher.backend = "device"
    config.optimizer.update(learning_rate=3e-3, warmup_steps=0, ema_decay=0.999)
    config.train.update(num_steps=300, log_every=50)
    return config


@pytest.fixture(scope="module")
def shared(rectangles, tmp_path_factory):
    open_source(rectangles, "validation")  # prepares it
    return [
        f"--config.data.directory={rectangles.directory}",
        f"--config.data.prepared_directory={rectangles.prepared_directory}",
        f"--config.train.compilation_cache={tmp_path_factory.mktemp('compiled')}",
        "--config.train.overfit=4",
    ]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A COCO directory of four images of 64 x 64 pixels, each with 16 squares of 8."""
    root = tmp_path_factory.mktemp("crowded")
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    image, corners = np.zeros((64, 64, 3), np.uint8), [(x, y) for x in range(4, 64, 16) for y in range(4, 64, 16)]
    for x, y in corners:
        image[y : y + 8, x : x + 8] = 255
    entry = {"category_id": 1, "area": 64, "iscrowd": 0}
    boxes = [(i, [x, y, 8, 8]) for i in range(4) for x, y in corners]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(4)],
        "annotations": [entry | {"id": n, "image_id": i, "bbox": box} for n, (i, box) in enumerate(boxes)],
        "categories": [{"id": 1, "name": "square"}],
    }
    for i in range(4):
        cv2.imwrite(str(root / "val2017" / f"{i}.png"), image)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return f"data.directory={root}"


@pytest.fixture
def overfit(shared, tmp_path, monkeypatch, capsys):
    """A run with these fields -> (status, stdout, stderr), on one device."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("deperceiver_jax.training.train.make_mesh", lambda model: make_mesh(model, jax.devices()[:1]))

    def start(*fields, family="deperceiver_plus", backbone=Patches):
        with monkeypatch.context() as patch:
            if backbone:
                patch.setattr("deperceiver_jax.models.detector.ResNet", backbone)
            command = ["train.py", f"--config={__file__}:{family}", f"--workdir={tmp_path / 'run'}", *shared]
            status = run(program.main, [*command, *(f"--config.{field}" for field in fields)])
        return status, *capsys.readouterr()

    return start


def test_a_right_set_up_is_learned(overfit, tmp_path, capsys):
    """Before its last step, without what would hinder it; the same command says the same again."""
    status, out, err = overfit()
    assert status == 0, err
    *_, finished, verdict = out.splitlines()
    step = int(verdict.removesuffix(" steps.").rpartition(" ")[2])
    assert step in range(50, 300, 50) and f"after step {step} of 300, because the images are learned" in finished
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["split"] == "overfit" and rows[-1]["step"] == step and rows[-1]["AP50"] > 0.9
    assert verdict == f"Learned: AP50 is {rows[-1]['AP50']:.3f} on the 4 images after {step} steps."
    assert json.loads((tmp_path / "run" / "data.json").read_text())["images"] == 4
    assert (tmp_path / "run" / "eval" / str(step) / "overfit" / "metrics.json").exists()
    assert run(report_program.main, ["report", f"--workdir={tmp_path / 'run'}"]) == 1  # they are no split's
    assert "has no evaluation; make one with: deperceiver eval" in capsys.readouterr().err
    config = read_config(tmp_path / "run" / "config.json")
    assert (config.data.batch_size, config.data.scales, config.model.dropout) == (4, (64,), 0.0)

    again, out, _ = overfit()
    assert again == 0 and out.splitlines()[-2:] == [finished, verdict]
    status, _, err = overfit("train.overfit=5")
    assert status == 1 and "whose config differs: " in err and "train.overfit (4, now 5)" in err


FEW = "train.num_steps=20"
RATE = "(config.optimizer.learning_rate), is far too"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["optimizer.learning_rate=5e-4"], "it has not trained for long enough: its loss still falls, from "),
        (["loss.weight_class=0.0"], "config.loss.weight_class is 0, so no query learns which class it is."),
        (["loss.weight_bbox=0.0", "loss.weight_giou=0.0"], "config.loss.weight_bbox and weight_giou are 0, so "),
        (["optimizer.learning_rate=1e-7"], f"the learning rate, 1e-07 {RATE} low: a step changes the parameters by "),
        (["optimizer.learning_rate=1.0"], f"the learning rate, 1 {RATE} high: a step changes the parameters by "),
        (
            ["data.eval_scale=32", "model.strides=(32,)", "model.num_queries=2"],
            "the boxes are far smaller than a cell of the finest map: half",
        ),
    ],
    ids=["steps", "class", "boxes", "low", "high", "cells"],
)
def test_what_hinders_learning_is_named(overfit, fields, reason):
    status, _, err = overfit(FEW, *fields, family="detr")
    assert status == 1 and err.startswith("error: Not learned: AP50 is 0.") and err.count("\n") == 1
    assert reason in err, err


def test_more_objects_than_queries_are_named(overfit, crowded):
    status, _, err = overfit(FEW, crowded, family="detr")
    assert status == 1 and "an image has 16 objects, but config.model.num_queries is 6, and 40 a step found no " in err


def test_a_backbone_frozen_at_random_is_named(overfit, tmp_path):
    fields = ("norm=frozen_batch_norm", "frozen_stages=2", "width=4")
    status, _, err = overfit(*(f"model.backbone.{field}" for field in fields), backbone=None)
    assert status == 1 and "so they would stay as they begin, random: load a ResNet (" in err
    assert not (tmp_path / "run").exists()


def test_too_few_images_with_boxes(overfit, tmp_path):
    status, _, err = overfit("train.overfit=10")
    sentence = "config.train.overfit is 10, but only 9 of the training split's 10 images have a box to learn."
    assert status == 1 and err == f"error: {sentence}\n" and not (tmp_path / "run").exists()


def test_images_of_a_run_are_those_of_the_split(rectangles):
    """Evenly spread, each with its own annotations and pixels."""
    source = open_source(rectangles, "validation")
    few = few_pictures(source, 3)
    positions = [source.image_ids.tolist().index(id) for id in few.image_ids.tolist()]
    assert len(positions) == len(few) == 3 and positions == sorted(positions) and few.classes == source.classes
    for here, there in enumerate(positions):
        assert few.filename(here) == source.filename(there) and few.image_bytes(here) == source.image_bytes(there)
        assert all(np.array_equal(*pair) for pair in zip(few.targets(here), source.targets(there), strict=True))
        pairs = zip(few.annotations(here), source.annotations(there), strict=True)
        assert len(few.targets(here)[0]) and all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("batch", "parts", "expected"), [(32, 1, (8, 1)), (32, 8, (8, 2)), (48, 4, (8, 1)), (4, 2, (4, 2))]
)
def test_parts_of_a_batch_keep_their_size(batch, parts, expected):
    config = get_config()
    config.train.overfit, config.data.batch_size, config.optimizer.accumulate_steps = 8, batch, parts
    train_on_few(config)
    assert (config.data.batch_size, config.optimizer.accumulate_steps) == expected

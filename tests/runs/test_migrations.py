"""What version 0.1.0 stored is read: configs of all families, and a run whose parameters have other names now."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import deformable_detr, demo, deperceiver, deperceiver_plus, detr, smca
from deperceiver_jax import UserError, __version__, load_detector
from deperceiver_jax import train as train_program
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models.layers import linear
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.migrations import MIGRATIONS, migrate, renamed_paths
from deperceiver_jax.runs.workdir import config_text, flat_fields, read_config
from tests.drawn_arrays import abstract_detector

STORED = Path(__file__).parents[1] / "golden" / "stored_0_1_0"
CONFIGS = {
    "deperceiver": deperceiver.get_config("r50_multiscale"),
    "deperceiver_demo": demo.get_config("deperceiver"),
    "deperceiver_plus": deperceiver_plus.get_config("r50_multiscale"),
    "detr": detr.get_config("r50_dc5"),
    "deformable_detr": deformable_detr.get_config("r50_two_stage"),
    "smca": smca.get_config("r50_multiscale_conv"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_the_version_before_is_todays(name):
    config = read_config(STORED / f"{name}.json")
    assert config.model.backbone.weights == ""  # that run read none, and today's configs name some
    then = {"model.backbone.weights": ""}
    if name == "deperceiver_plus":  # what it was trained with, and stays with
        then |= {"model.box_deltas": "logits", "loss.classification": "sigmoid_focal"}
        then |= {"model.decoder.look_forward_twice": False}
    if name == "deperceiver_demo":  # whose pictures had two padded sizes
        then |= {"data.buckets": 2}
    assert flat_fields(config) == flat_fields(CONFIGS[name]) | then
    abstract_detector(config)


@pytest.mark.slow
def test_a_run_of_the_version_before_loads_and_goes_on(rectangles, tmp_path, capsys, monkeypatch):
    """Weights, average and moments of a parameter that is called otherwise now, to the same numbers."""
    monkeypatch.setattr(linear, "_draw_in_twos", linear._draw)  # CPUs draw other dropout since 0.2.6
    workdir = tmp_path / "run"
    with zipfile.ZipFile(STORED / "run.zip") as archive:
        archive.extractall(workdir)
    answers = np.load(STORED / "answers.npz")
    detector, _, _ = load_detector(workdir)
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    predictions = jax.jit(detector)(*normalize_images(image, np.array([[64, 96], [50, 70]], np.int32)))
    np.testing.assert_allclose(predictions.logits, answers["logits"], atol=1e-5)
    np.testing.assert_allclose(predictions.boxes, answers["boxes"], atol=1e-6)

    arguments = [f"--workdir={workdir}", "--config=tests/stored_smca.py", "--config.train.num_steps=4"]
    arguments += [f"--config.data.directory={rectangles.directory}", "--config.train.compilation_cache="]
    arguments += [f"--config.data.prepared_directory={rectangles.prepared_directory}"]
    assert run(train_program.main, ["train.py", *arguments]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    np.testing.assert_allclose(losses, answers["losses"], rtol=1e-5)
    assert json.loads((workdir / "config.json").read_text())["version"] == __version__


def test_a_stored_config_says_which_version_wrote_it(tmp_path):
    config = CONFIGS["detr"]
    (tmp_path / "config.json").write_text(config_text(config))
    assert json.loads((tmp_path / "config.json").read_text())["version"] == __version__
    assert flat_fields(read_config(tmp_path / "config.json")) == flat_fields(config)
    later = {**json.loads(config_text(config)), "version": "99.0.0"}
    with pytest.raises(UserError, match="x.json was written by version 99.0.0, which is later than this one"):
        migrate(later, "x.json")
    newest, this = ([int(part) for part in version.split(".")] for version in (MIGRATIONS[-1].version, __version__))
    assert newest <= this


@pytest.mark.parametrize(("stored", "read"), [(None, "logits"), ("logits", "logits"), ("scaled", "scaled")])
def test_box_deltas_of_0_2_0_stay_what_they_were(stored, read):
    """Most runs of that version did not store them."""
    config = {**json.loads(config_text(CONFIGS["deperceiver_plus"])), "version": "0.2.0"}
    del config["model"]["box_deltas"]
    if stored is not None:
        config["model"]["box_deltas"] = stored
    assert migrate(config, "x")["model"]["box_deltas"] == read
    others = {**json.loads(config_text(CONFIGS["detr"])), "version": "0.2.0"}
    assert "box_deltas" not in migrate(others, "x")["model"]


@pytest.mark.parametrize(
    "name, field, value, sentence",
    [
        ("deperceiver", "model.read_tokens", True, "x: its field read_tokens is True, which no version since 0.2.0"),
        ("deperceiver", "model.levels.embedding", "add", "its field embedding is 'add'"),
        ("deperceiver_plus", "loss.proposal_repeats", 4, "its field proposal_repeats is 4"),
        ("detr", "model", {"name": "detr"}, "x is not a whole config: it lacks stride."),
    ],
)
def test_what_cannot_be_carried_over_is_said(name, field, value, sentence):
    stored = json.loads((STORED / f"{name}.json").read_text())
    *sections, last = field.split(".")
    section = stored
    for step in sections:
        section = section[step]
    section[last] = value
    with pytest.raises(UserError, match=sentence):
        migrate(stored, "x")


def test_paths_that_changed():
    paths = [
        "levels/projections/0/kernel",
        "levels/projections/1/kernel",
        "levels/halvings/0/bias",
        "decoder/norm/scale",
    ]
    assert renamed_paths(paths) == {"levels/halvings/0/bias": "levels/projections/2/bias"}
    assert renamed_paths(paths[:2]) == {}

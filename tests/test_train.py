"""train.py end to end on eight devices: what a run leaves, how it goes on, and what goes wrong.

The backbone is the mean pixel of each cell, but where it is the question.
"""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from deperceiver_jax import eval as evaluation_program
from deperceiver_jax import train as program
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import SUMMARY
from deperceiver_jax.models import detector
from deperceiver_jax.models.features.resnet import ResNet
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.checkpoint_files import all_steps
from deperceiver_jax.runs.stored_detector import find_detector, load_params
from deperceiver_jax.runs.workdir import keep_others_out, read_config
from tests.drawn_arrays import Patches
from tests.train_process import Run

pytestmark = pytest.mark.slow

CONFIG = "--config=tests/tiny_training.py"


@pytest.fixture(scope="module", autouse=True)
def without_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "ResNet", Patches)
        yield


@pytest.fixture(scope="module")
def shared(rectangles, tmp_path_factory):
    """Overrides that every run here has: prepared data, one batch for all eight devices, and one compilation cache."""
    open_source(rectangles, "validation")  # prepares it
    return [
        f"--config.data.directory={rectangles.directory}",
        f"--config.data.prepared_directory={rectangles.prepared_directory}",
        f"--config.train.compilation_cache={tmp_path_factory.mktemp('compiled')}",
        "--config.data.batch_size=8",
        "--config.eval.batch_size=8",
    ]


@pytest.fixture(autouse=True)
def signals():
    """A run takes SIGTERM and SIGINT; the tests have them back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def train(*arguments) -> int:
    return run(program.main, ["train.py", *map(str, arguments)])


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
            patch.setenv(name, "true")
        assert train(CONFIG, f"--workdir={workdir}", *shared, "--config.train.trackers=('mlflow',)") == 0
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run that a test may write into."""
    return shutil.copytree(finished, tmp_path / "run")


def test_what_a_run_leaves(finished):
    config = read_config(finished / "config.json")
    assert (config.model.num_classes, config.train.num_steps, config.data.scales) == (2, 6, (48, 64))
    assert json.loads((finished / "classes.json").read_text())["num_slots"] == 2
    assert all_steps(finished) == [3, 6]
    assert list(finished.glob("events.out.tfevents.*"))
    assert len(list(finished.glob("mlruns/*/*/artifacts/validation/images/6/*.png"))) == 4

    rows = rows_of(finished)
    assert [(row["step"], row["split"]) for row in rows] == [(4, "train"), (6, "train"), (6, "validation")]
    named = {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error", "num_boxes", "surplus_boxes"}
    named |= {"loss", "grad_norm", "update_norm", "lr", "images_per_second", "host_memory_gib", "epoch"}
    assert named <= rows[0].keys()
    terms = [rows[0][name] for name in ("loss_ce", "loss_bbox", "loss_giou")]
    assert rows[0]["loss"] == pytest.approx(np.dot([1.0, 5.0, 2.0], terms), rel=1e-5)

    metrics = json.loads((finished / "eval" / "6" / "metrics.json").read_text())
    assert list(metrics) == [*SUMMARY, "by_class", "by_size"]
    assert {name: rows[2].get(name) for name in metrics} == metrics | {"by_class": None, "by_size": None}
    assert len(json.loads((finished / "eval" / "6" / "detections.json").read_text())) == 10 * 5


def test_eval_py_agrees_with_the_run(workdir):
    before = (workdir / "eval" / "6" / "metrics.json").read_bytes()
    shutil.rmtree(workdir / "eval")
    assert run(evaluation_program.main, ["eval.py", f"--workdir={workdir}", "--config.eval.batch_size=8"]) == 0
    assert (workdir / "eval" / "6" / "metrics.json").read_bytes() == before


def test_a_finished_run_is_left_alone_but_for_a_lost_evaluation(workdir, shared, capsys):
    """As after a kill between the last checkpoint and the end of its evaluation."""
    log = (workdir / "metrics.jsonl").read_text()
    results = (workdir / "eval" / "6" / "detections.json").read_bytes()
    (workdir / "metrics.jsonl").write_text("".join(line for line in log.splitlines(True) if '"train"' in line))
    shutil.rmtree(workdir / "eval")
    assert train(CONFIG, f"--workdir={workdir}", *shared) == 0
    assert "and nothing left to do." in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == log
    assert (workdir / "eval" / "6" / "detections.json").read_bytes() == results


def test_a_run_can_be_made_longer_but_not_another_one(workdir, shared, capsys):
    assert train(CONFIG, f"--workdir={workdir}", *shared, "--config.optimizer.learning_rate=0.5") == 1
    assert (
        "holds another run, whose config differs: optimizer.learning_rate (0.001, now 0.5)" in capsys.readouterr().err
    )
    assert train(CONFIG, f"--workdir={workdir}", *shared, "--config.train.num_steps=7") == 0
    assert "steps 7 to 7." in capsys.readouterr().out
    assert all_steps(workdir) == [6, 7]
    assert rows_of(workdir)[-1]["step"] == 7


def test_patience_ends_a_run_where_it_would_have_ended_without_a_break(shared, tmp_path, capsys):
    """Nothing is learned in so few steps."""
    patient = [*shared, *(f"--config.train.{field}" for field in ("eval_every=1", "log_every=1", "patience=1"))]
    ends = []
    for workdir, times in ((tmp_path / "whole", (9,)), (tmp_path / "broken", (1, 9))):
        for steps in times:
            assert train(CONFIG, f"--workdir={workdir}", *patient, f"--config.train.num_steps={steps}") == 0
            ends.append(capsys.readouterr().out.splitlines()[-1].split(f": {workdir}")[0])
    assert ends[1:] == ["Finished after step 1 of 1", ends[0]]
    assert re.fullmatch(
        r"Finished after step [2-8] of 9, because AP, 0.\d+ after .*, has not risen in 1 evaluation", ends[0]
    )
    rows = [
        [row | {"images_per_second": 0, "host_memory_gib": 0} for row in rows_of(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]


def test_a_run_goes_on_under_any_name(finished, shared, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "lr[1e-4] #1 50% what? ü*")
    assert train(CONFIG, f"--workdir={workdir}/", *shared, "--config.train.num_steps=7") == 0
    assert all_steps(workdir) == [6, 7]
    assert run(evaluation_program.main, ["eval.py", f"--workdir={workdir}", "--config.eval.batch_size=8"]) == 0
    assert (workdir / "eval" / "7" / "metrics.json").exists()


def test_one_run_in_a_workdir(workdir, shared, capsys):
    """Another one leaves everything as it was."""
    with keep_others_out(workdir):
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        assert train(CONFIG, f"--workdir={workdir}", *shared, "--config.train.num_steps=7") == 1
    assert capsys.readouterr().err == f"error: --workdir: another run is at work in {workdir}; take another one.\n"
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_annotations_that_changed(workdir, shared, rectangles, tmp_path, capsys):
    """Refused, unless a field allows it; then the run belongs to the new ones."""
    data = shutil.copytree(rectangles.directory, tmp_path / "data", ignore=shutil.ignore_patterns("prepared"))
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": content["annotations"][:-1]}))
    longer = [*shared, f"--config.data.directory={data}", "--config.train.num_steps=7"]
    assert train(CONFIG, f"--workdir={workdir}", *longer) == 1
    sentence = f"The training split is not what {workdir} was trained on: 10 images with 9 boxes then, 10 images with 8"
    assert sentence in capsys.readouterr().err
    assert train(CONFIG, f"--workdir={workdir}", *longer, "--config.data.allow_changed=True") == 0
    assert all_steps(workdir) == [6, 7] and json.loads((workdir / "data.json").read_text())["boxes"] == 8
    assert train(CONFIG, f"--workdir={workdir}", *longer) == 0  # nothing left to do


def test_a_split_that_cannot_be_evaluated(shared, rectangles, tmp_path, capsys):
    data = shutil.copytree(rectangles.directory, tmp_path / "data", ignore=shutil.ignore_patterns("prepared"))
    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    (data / "val2017").rename(data / "images")
    (data / "annotations" / "instances_train.json").write_text(json.dumps(content))
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(content | {"annotations": []}))
    fields = [f"--config.data.directory={data}", "--config.data.train_split=train"]
    assert train(CONFIG, f"--workdir={tmp_path / 'run'}", *shared, *fields) == 1
    assert f"Split validation of {data} has no annotations to evaluate with." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_log_with_garbage_is_mended(workdir, shared, capsys):
    """As after a crash of the machine: zeros at the end. eval.py finds the best step all the same."""
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 200 + b"\n")
    arguments = [f"--workdir={workdir}", "--checkpoint=best", "--config.eval.batch_size=8"]
    assert run(evaluation_program.main, ["eval.py", *arguments]) == 0
    assert train(CONFIG, f"--workdir={workdir}", *shared) == 0
    assert "warning: line 4 of " in capsys.readouterr().err
    assert len(rows_of(workdir)) == 3


def test_starting_from_another_run_and_a_loss_that_is_not_finite(finished, shared, tmp_path, capsys):
    """The first step learns nothing, so it keeps the parameters; with the second epoch the rate explodes."""
    workdir = tmp_path / "second"
    rates = [f"--config.optimizer.{field}" for field in ("learning_rate=1e-20", "drop_epochs=(1,)", "drop_factor=1e38")]
    often = [f"--config.train.{field}" for field in ("eval_every=1", "checkpoint_every=1")]
    assert train(CONFIG, f"--workdir={workdir}", *shared, *rates, *often, f"--config.init_from={finished}") == 1
    error = capsys.readouterr().err
    stopped = f"error: update_norm is inf in step 2, where the run stops; {workdir} has the checkpoint of step 1."
    reason = " The likely reason: the learning rate, 1e+18 (config.optimizer.learning_rate), is far too high: a step "
    assert error.startswith(stopped + reason) and error.count("\n") == 1
    assert all_steps(workdir) == [1]
    assert [(row["step"], row["split"]) for row in rows_of(workdir)] == [(1, "validation")]

    first, second = (load_params(find_detector(directory).items) for directory in (finished, workdir))
    assert first.keys() == second.keys()
    for path, array in first.items():
        np.testing.assert_allclose(second[path], array, rtol=1e-6, atol=1e-12, err_msg=path)
    scores = [json.loads((run / "metrics.json").read_text()) for run in (finished / "eval/6", workdir / "eval/1")]
    assert [scores[0][name] for name in SUMMARY] == pytest.approx([scores[1][name] for name in SUMMARY], abs=1e-6)


SCALES = ["--config.eval.scales=(256,)"]
LEARNED = ["--config.model.position.encoding=learned"]
PRETRAINED = ["--config.model.backbone.norm=frozen_batch_norm"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.data.batchsize=8"], "The config has no field data.batchsize; the nearest is data.batch_size"),
        (["--config.train.overfit=-1"], "config.train.overfit is -1; it must be at least 0."),
        (["--config.data.batch_size=0"], "config.data.batch_size is 0; it must be at least 1."),
        (["--config.data.batch_size=6"], "config.data.batch_size is 6, which does not divide over 8 devices"),
        (["--config.optimizer.accumulate_steps=3"], "is 8, which config.optimizer.accumulate_steps 3 does not divide"),
        (["--config.optimizer.accumulate_steps=0"], "config.optimizer.accumulate_steps is 0"),
        (["--config.train.eval_every=-3"], "config.train.eval_every is -3"),
        (["--config.data.directory=/nowhere"], "/nowhere"),
        (["--config.model.name=detectron"], "config.model.name is 'detectron'"),
        (["--config.optimizer.groups.rest.pattern=^heads/"], "none of backbone, rest matches decoder/"),
        (["--config.init_from=/nowhere"], "/nowhere is not a directory"),
        (PRETRAINED, "Nothing is loaded into 40 frozen arrays of the backbone"),
        (["--config.optimizer.groups.backbone.multiplier=0.0"], "so they would stay as they begin, random: load a "),
        ([*PRETRAINED, "--config.model.backbone.weights=/nowhere.pth"], "/nowhere.pth"),
        (
            [*PRETRAINED, "--config.model.backbone.weights=hf://timm/resnet18"],
            "hf://timm/resnet18 is not in the cache, ",
        ),
        (
            ["--config.model.backbone.weights=/nowhere.pth"],
            "it would have one with config.init_from= and config.model.ba",
        ),
        (
            [*LEARNED, "--config.model.position.learned_size=2"],
            "pixels, padding included, will come, but: A feature map of ",
        ),
        (
            [*LEARNED, "--config.model.position.learned_size=16", "--config.data.eval_max_size=512", *SCALES],
            "Images of 512 x 512 pixels, padding included, will come, but: A feature map of ",
        ),
        (["--workdir=s3://bucket/run"], "--workdir is s3://bucket/run: of addresses with :// only gs:// is known"),
        (["--config.mesh.model=3"], "config.mesh.model is 3, which does not divide the 8 devices"),
        (["--config.train.keep_checkpoints=0"], "config.train.keep_checkpoints is 0"),
        (["--steps=3"], "There is no flag --steps"),
    ],
    ids=lambda value: value[0].split("=")[0].split(".")[-1] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_sentence_and_leaves_nothing(shared, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(detector, "ResNet", ResNet)
    assert train(CONFIG, f"--workdir={tmp_path / 'run'}", *shared, *arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_workdir_and_a_config(shared, capsys):
    assert train(CONFIG, *shared) == 1
    assert "--workdir is missing" in capsys.readouterr().err
    assert train("--workdir=x") == 1
    assert "--config is missing" in capsys.readouterr().err
    assert train("--config=configs/deperceiver.py:r50_2", "--workdir=x") == 1
    assert "has no variant 'r50_2'; it has r50_32" in capsys.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(workdir, shared, finished, capsys):
    """With every one damaged it says so and leaves everything as it was."""
    shutil.rmtree(workdir / "checkpoints" / "6" / "training" / "d")
    assert train(CONFIG, f"--workdir={workdir}", *shared) == 0
    streams = capsys.readouterr()
    warning = f"warning: {workdir}/checkpoints/6/training is damaged or incomplete: "
    assert streams.err.startswith(warning), streams.err
    assert f"It is {workdir}/checkpoints/6.damaged now, and the run continues from step 3." in streams.err
    assert "steps 4 to 6." in streams.out
    assert all_steps(workdir) == [3, 6]
    arrays = [load_params(find_detector(run).items) for run in (workdir, finished)]
    assert all(np.array_equal(array, arrays[1][path]) for path, array in arrays[0].items())
    assert [without_speed(row) for row in rows_of(workdir)] == [without_speed(row) for row in rows_of(finished)]

    for step in ("3", "6"):
        (workdir / "checkpoints" / step / "weights" / "manifest.ocdbt").unlink()
    before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
    assert train(CONFIG, f"--workdir={workdir}", *shared, "--config.train.num_steps=9") == 1
    assert f"error: {workdir}/checkpoints/6/weights is damaged or incomplete: " in capsys.readouterr().err
    assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before


def last_two(workdir):
    """The lines of the two steps that a run of six was continued by."""
    lines = [row for row in rows_of(workdir) if row["step"] > 6 and row["split"] == "train"]
    assert [row["step"] for row in lines] == [7, 8]
    return lines


def without_speed(row):
    """Its numbers; all rows that are compared are of one split."""
    return {name: value for name, value in row.items() if name not in ("images_per_second", "host_memory_gib", "split")}


def test_a_run_of_eight_devices_continues_on_four_and_on_one(workdir, finished, shared, tmp_path):
    """As real processes. On the four, parameters and optimiser state are split over two, which the next run undoes."""
    longer = ["--config.train.num_steps=8", "--config.train.log_every=1", "--config.train.eval_every=-1"]
    others = {"four": shutil.copytree(finished, tmp_path / "four"), "one": shutil.copytree(finished, tmp_path / "one")}
    runs = [
        Run(others["four"], [*shared, *longer, "--config.mesh.model=2"], devices=4),
        Run(others["one"], [*shared, *longer], devices=1),
    ]
    assert train(CONFIG, f"--workdir={workdir}", *shared, *longer) == 0
    for run_, devices in zip(runs, ("4 cpu devices", "1 cpu device "), strict=True):
        status, out, err = run_.end()
        assert status == 0, err
        assert devices in out and "steps 7 to 8." in out
    expected = last_two(workdir)
    for other in others.values():
        for here, there in zip(expected, last_two(other), strict=True):
            assert without_speed(there) == pytest.approx(without_speed(here), rel=1e-4)
    assert train(CONFIG, f"--workdir={others['four']}", *shared, *longer, "--config.train.num_steps=9") == 0
    scores = {row["step"]: row["AP"] for row in rows_of(others["four"]) if row["split"] == "validation"}
    del scores[9]  # it was saved before it was evaluated
    assert all_steps(others["four"]) == sorted({8, 9, max(scores, key=scores.get)})  # the last two and the best then

"""eval.py as a person runs it: a workdir alone, its checkpoints, overrides, imported weights and what goes wrong."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from deperceiver_jax import eval as program
from deperceiver_jax import load_detector
from deperceiver_jax.data import open_source
from deperceiver_jax.data.batches.loader import EvaluationBatches
from deperceiver_jax.evaluation.coco_metric import SUMMARY, ground_truth
from deperceiver_jax.images import normalize_images
from deperceiver_jax.program.command_line import run
from deperceiver_jax.report import __main__ as report_program
from deperceiver_jax.runs.stored_detector import find_detector, load_params, save_params
from deperceiver_jax.runs.workdir import read_config
from tests.evaluation.coco_oracle import assert_same, reference
from tests.shared_work import abstract_detectors_are_shared, detect_steps_are_shared  # noqa: F401

pytestmark = pytest.mark.slow


def evaluate(*arguments):
    return run(program.main, ["eval.py", *map(str, arguments)])


def read(directory):
    return [json.loads((directory / name).read_text()) for name in ("metrics.json", "detections.json")]


@pytest.fixture
def workdir(tiny_run, tmp_path):
    """A copy of the run that a test may write into."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_workdir_is_all_it_needs(workdir, capsys):
    """Five boxes of every image, from the moving average of the latest step; metrics.json is of detections.json."""
    assert evaluate(f"--workdir={workdir}", "--report") == 0
    metrics, detections = read(workdir / "eval" / "7")
    assert list(metrics) == [*SUMMARY, "by_class", "by_size"]
    page = (workdir / "eval" / "7" / "report.html").read_text()
    assert "deperceiver on coco_directory, validation, step 7" in page
    config = read_config(workdir / "config.json")
    source = open_source(config.data, "validation")
    assert_same(metrics, reference(ground_truth(source), detections))
    printed = capsys.readouterr().out
    assert printed.count("Average Precision") == 6 and printed.count("Average Recall") == 6 and "APs / AP" in printed

    detector, config, classes = load_detector(workdir)
    batch = next(iter(EvaluationBatches(source, config.data, batch_size=8)))
    predictions = jax.jit(lambda *images: detector(*normalize_images(*images)))(batch.image, batch.size)
    probabilities = jax.nn.softmax(predictions.logits[-1])[0, :, :-1].max(-1)
    found = [d for d in detections if d["image_id"] == source.image_ids[batch.example[0]]]
    assert len(found) == 5 and {d["category_id"] for d in found} <= set(classes.category_ids) == {20, 30}
    np.testing.assert_allclose([d["score"] for d in found], np.sort(probabilities)[::-1], rtol=1e-4)


def test_checkpoints_by_name_and_number(workdir):
    for checkpoint in ("3", "latest"):
        assert evaluate(f"--workdir={workdir}", f"--checkpoint={checkpoint}") == 0
    third, seventh = read(workdir / "eval" / "3"), read(workdir / "eval" / "7")
    assert third[1] != seventh[1]
    shutil.rmtree(workdir / "eval")
    assert evaluate(f"--workdir={workdir}", "--checkpoint=best") == 0
    assert [path.name for path in (workdir / "eval").iterdir()] == ["3"]
    assert read(workdir / "eval" / "3") == third
    assert evaluate(f"--workdir={workdir / 'checkpoints' / '3'}", f"--output={workdir / 'again'}") == 0
    assert read(workdir / "again") == third


def test_the_report_of_an_evaluation_that_is_there(workdir, capsys):
    """The same file as eval.py's, from what it wrote; and what to do where there is no evaluation, or an older one."""
    report = functools.partial(run, report_program.main)
    assert report(["report", f"--workdir={workdir}"]) == 1
    assert f"{workdir} has no evaluation; make one with" in capsys.readouterr().err
    assert evaluate(f"--workdir={workdir}", "--report") == 0
    folder = workdir / "eval" / "7"
    assert report(["report", f"--workdir={workdir}", f"--output={workdir}/again.html"]) == 0
    assert (workdir / "again.html").read_text() == (folder / "report.html").read_text()
    metrics, _ = read(folder)
    (folder / "metrics.json").write_text(json.dumps({"AP": metrics["AP"]}))
    assert report(["report", f"--workdir={workdir}"]) == 1
    assert f"{folder}/metrics.json was written before 0.2.0; run eval.py again" in capsys.readouterr().err
    assert report(["report"]) == 1 and "--workdir is missing" in capsys.readouterr().err


def test_overrides_of_the_stored_config(workdir):
    output = workdir / "two"
    assert evaluate(f"--workdir={workdir}", "--config.eval.max_detections=2", f"--output={output}") == 0
    _, detections = read(output)
    assert len(detections) == 2 * 10 and not (workdir / "eval").exists()


def test_a_split_without_annotations_gets_detections_alone(workdir, rectangles, tmp_path, capsys):
    """As COCO's test pictures: results to be handed in, and no metrics that nobody could count."""
    data = shutil.copytree(rectangles.directory, tmp_path / "data", ignore=shutil.ignore_patterns("prepared"))
    (data / "val2017").rename(data / "test2017")
    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    (data / "annotations" / "instances_val2017.json").unlink()
    del content["annotations"]
    (data / "annotations" / "image_info_test2017.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    fields = [f"--config.data.directory={data}", f"--config.data.prepared_directory={tmp_path / 'prepared'}"]
    assert evaluate(f"--workdir={workdir}", "--split=test", *fields, f"--output={output}") == 0
    assert "detections.json; split test has no annotations." in capsys.readouterr().out
    assert sorted(file.name for file in output.iterdir()) == ["data.json", "detections.json"]
    assert evaluate(f"--workdir={workdir}") == 0
    assert json.loads((output / "detections.json").read_text()) == read(workdir / "eval" / "7")[1]


def test_another_config_file_with_imported_weights(workdir, tmp_path, rectangles, monkeypatch, request):
    """--weights with the directory's own config, and with a config file, which must describe the same model."""
    weights, stored = tmp_path / "imported", find_detector(workdir)
    text = [(workdir / name).read_text() for name in ("config.json", "classes.json")]
    save_params(weights, load_params(stored.items), *text)
    assert evaluate(f"--weights={weights}") == 0
    assert evaluate(f"--workdir={workdir}") == 0
    assert read(weights / "eval" / "weights") == read(workdir / "eval" / "7")
    config_file = tmp_path / "tiny.py"
    config_file.write_text(
        "from pathlib import Path\n"
        "from deperceiver_jax.runs.workdir import read_config\n"
        f"def get_config():\n    return read_config(Path({str(workdir / 'config.json')!r}))\n"
    )
    arguments = [f"--config={config_file}", f"--weights={weights}", f"--output={tmp_path / 'out'}"]
    assert evaluate(*arguments, "--config.data.eval_scale=64", "--config.data.eval_max_size=107") == 0
    assert read(tmp_path / "out")[1] != read(weights / "eval" / "weights")[1]


def without_classes(workdir):
    (workdir / "classes.json").unlink()


def with_other_classes(workdir):
    text = (workdir / "classes.json").read_text()
    (workdir / "classes.json").write_text(text.replace("green", "blue"))


def nothing(workdir):
    pass


def with_an_evaluation_of_other_data(workdir):
    data = {"images": 3, "boxes": 2, "hash": "0"}
    (workdir / "eval" / "7").mkdir(parents=True)
    (workdir / "eval" / "7" / "data.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change, arguments, sentence",
    [
        (nothing, ["--workdir={0}/none"], "{0}/none is not a directory."),
        (nothing, ["--workdir={0}/checkpoints"], "{0}/checkpoints has no checkpoint and no weights."),
        (nothing, ["--workdir={0}", "--checkpoint=4"], "{0} has no checkpoint '4'; it has [3, 7], latest and best."),
        (nothing, ["--workdir={0}", "--split=tests"], "Data set coco_directory has no split 'tests'; it has train, va"),
        (nothing, ["--workdir={0}", "--config.data.directory=/nowhere"], "There is no directory /nowhere"),
        (
            nothing,
            ["--workdir={0}", "--config.eval.max_detection=3"],
            "The config has no field eval.max_detection; the",
        ),
        (
            nothing,
            ["--workdir={0}", "--config.eval.batch_size=0"],
            "config.eval.batch_size is 0; it must be at least 1",
        ),
        (
            nothing,
            ["--workdir={0}", "--config.eval.flip=True"],
            "--output is needed: config.eval.flip is True, and {0}/eval keeps what was evaluated with False.",
        ),
        (
            with_an_evaluation_of_other_data,
            ["--workdir={0}"],
            "--output is needed: {0}/eval/7 keeps an evaluation of other data: 3 images with 2 boxes, not 10 images ",
        ),
        (
            nothing,
            ["--workdir={0}/checkpoints/7", "--checkpoint=3"],
            "Checkpoint 3 is asked for, but {0}/",
        ),
        (nothing, ["--workdir={0}", "--config.model.num_queries=6"], "{0}/checkpoints/7 holds another model: "),
        (
            nothing,
            ["--workdir={0}", "--output={0}/config.json/x"],
            "--output: {0}/config.json/x cannot be written: {0}/",
        ),
        (nothing, ["--workdir={0}", "--weights={0}"], "--workdir and --weights are both given; take one of them."),
        (nothing, [], "Either --workdir or --weights is needed"),
        (without_classes, ["--workdir={0}"], "{0}/classes.json does not exist."),
        (with_other_classes, ["--workdir={0}"], "The classes of {0}/checkpoints/7 and the data set's split validation"),
    ],
)
def test_mistakes_are_one_sentence(change, arguments, sentence, workdir, capsys):
    change(workdir)
    assert evaluate(*(argument.format(workdir) for argument in arguments)) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: " + sentence.format(workdir)), printed
    assert not list(workdir.glob("eval/*/detections.json"))


def test_a_checkpoint_from_another_model_names_the_parameters(workdir, capsys):
    assert evaluate(f"--workdir={workdir}", "--config.model.num_queries=6") == 1
    assert "is (5, 32) there and (6, 32) in the model" in capsys.readouterr().err


def test_as_a_program(workdir, request):
    """Once as a process of its own: the status and the table are what a shell sees."""
    command = [sys.executable, request.config.rootpath / "eval.py"]
    done = subprocess.run([*command, f"--workdir={workdir}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0." in done.stdout
    done = subprocess.run([*command, "--workdir=/nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: /nowhere is not a directory.\n")

"""Paths in a bucket, by the same calls as paths on a disk: checkpoints, logs, detectors, pictures, and refusals."""

import contextlib
import json
import re
import time

import jax
import numpy as np
import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, require_readable, require_writable, write_whole, written_whole
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs import mirror
from deperceiver_jax.runs.checkpoint_files import all_steps, best_step
from deperceiver_jax.runs.load_detector import load_detector
from deperceiver_jax.runs.mirror import Mirror
from deperceiver_jax.training.checkpoint import Checkpoints, newest_whole


def copy_run(workdir, bucket, name):
    """The files of a run in a bucket, with the mark that Orbax leaves there in complete directories."""
    for path in workdir.rglob("*"):
        if path.is_file() and "compiled" not in path.parts:
            write_whole(as_path(f"{bucket.url}/{name}/{path.relative_to(workdir)}"), path.read_bytes())
    for step in (workdir / "checkpoints").iterdir():
        for folder in (step, *(item for item in step.iterdir() if item.is_dir())):
            write_whole(as_path(f"{bucket.url}/{name}/{folder.relative_to(workdir)}/commit_success.txt"), "")
    return as_path(f"{bucket.url}/{name}")


@pytest.fixture(scope="module")
def stored(tiny_run, bucket_server):
    return copy_run(tiny_run, bucket_server, "stored")


def test_files_appear_whole_or_not_at_all(bucket):
    path = as_path(f"{bucket.url}/folder/file")
    with pytest.raises(ZeroDivisionError), written_whole(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert not path.exists()
    write_whole(path, "whole")
    write_whole(path, b"again")
    assert path.read_text() == "again" and [found.name for found in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("place", "status", "sentence"),
    [
        ("gs://nowhere/run", None, "--workdir: there is no bucket gs://nowhere."),
        ("gs://bucket/run", 403, "--workdir: gs://bucket/run cannot be read: Forbidden: b/bucket/o."),
        ("gs://bucket/run", 401, "--workdir: gs://bucket/run cannot be read: "),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_before_anything_is_done(bucket, place, status, sentence, capsys):
    from deperceiver_jax.train import main

    bucket.fault = lambda method, path: status
    assert run(main, ["train", "--config=demo:deperceiver", f"--workdir={place}"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {sentence}") and printed.count("\n") == 1, printed


def test_a_bucket_that_may_only_be_read(bucket):
    bucket.rights = ["storage.objects.list", "storage.objects.get"]
    with pytest.raises(UserError) as refusal:
        require_writable("--output", as_path(f"{bucket.url}/out"))
    lacking = "storage.objects.create, storage.objects.delete"
    assert str(refusal.value) == f"--output: gs://bucket/out cannot be written: gs://bucket does not permit {lacking}."


def test_what_others_change_is_seen_at_once_and_no_answer_is_not_no(bucket):
    require_readable("--workdir", folder := as_path(f"{bucket.url}/shared"))
    for step in (1, 2):
        write_whole(folder / "checkpoints" / str(step) / "commit_success.txt", "")
    assert all_steps(folder) == [1, 2]
    bucket.delete("shared/checkpoints/2/commit_success.txt")
    assert all_steps(folder) == [1]
    bucket.fault = lambda method, path: 403
    assert not folder.is_dir()  # epath's answer
    with pytest.raises(OSError, match="Forbidden"):
        all_steps(folder)


@pytest.mark.parametrize("place", ["gs://", "gs:///run", "gs://bucket/lr[1e-4]", "gs://bucket/a#1"])
def test_names_that_no_bucket_has(place):
    with pytest.raises(UserError, match="is not gs://BUCKET/... without any of the letters"):
        as_path(place)


def test_checkpoints_are_kept_found_and_restored(tiny, bucket, same):
    fixture, workdir = tiny(2, ema_decay=0.5), as_path(f"{bucket.url}/kept")
    write_whole(workdir / "metrics.jsonl", json.dumps({"step": 1, "split": "validation", "AP": 0.5}) + "\n")
    state = fixture.plan.initialize()
    with Checkpoints(workdir, keep=1) as checkpoints:
        for step in (1, 2, 3):
            state, _ = fixture.train(state, step - 1, step)
            checkpoints.save(state, {"window": step})
    assert all_steps(workdir) == [1, 3] and best_step(workdir, all_steps(workdir)) == 1
    with Checkpoints(workdir, keep=1) as checkpoints:
        restored, progress = checkpoints.restore(3, tiny(4, ema_decay=0.5).plan.abstract)
    same(jax.device_get(restored), jax.device_get(state))
    assert progress == {"window": 3}


@pytest.mark.parametrize("of", ["ocdbt", "commit_success"], ids=["TensorStore", "gcsfs"])
def test_a_save_that_is_refused_for_a_moment_is_repeated_and_told(tiny, bucket, capsys, of):
    fixture, workdir = tiny(), as_path(f"{bucket.url}/refused by {of}")
    require_readable("--workdir", workdir)
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.manager  # noqa: B018 - Orbax's requests at its start
        bucket.fault = lambda method, path: 503 if method == "POST" and of in path and bucket.refused < 2 else None
        checkpoints.save(fixture.plan.initialize(), {})
    assert all_steps(workdir) == [0] and bucket.refused == 2
    sentence = rf"warning: (\d) requests to {workdir}/checkpoints were repeated; nothing is lost."
    assert sum(map(int, re.findall(sentence, capsys.readouterr().err))) == 2


def test_a_damaged_checkpoint_is_set_aside_but_a_closed_bucket_is_no_damage(tiny, bucket, capsys):
    fixture, workdir = tiny(), as_path(f"{bucket.url}/damaged")
    state = fixture.plan.initialize()
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2):
            state, _ = fixture.train(state, step - 1, step)
            checkpoints.save(state, {"window": step})
    bucket.fault = lambda method, path: 403 if "ocdbt" in path else None
    with pytest.raises(UserError, match="checkpoints/2/weights cannot be read: ") as refusal:
        newest_whole(workdir)
    assert type(refusal.value) is UserError

    bucket.fault = lambda method, path: None
    (record,) = (name for name in bucket.names() if name.startswith("damaged/checkpoints/2/weights/d/"))
    write_whole(as_path(f"{bucket.url}/{record}"), bucket.read(record)[:-9])
    step, damaged = newest_whole(workdir)
    assert step == 1 and list(damaged) == [2]
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.set_aside(damaged, step)
        checkpoints.save(state, {"window": 2})
    assert all_steps(workdir) == [1, 2] and (workdir / "checkpoints" / "2.damaged" / "training").is_dir()
    assert f"It is {workdir}/checkpoints/2.damaged now" in capsys.readouterr().err


def test_growing_files_are_copied_now_and_then_and_at_once_when_asked(bucket, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    workdir = as_path(f"{bucket.url}/mirrored")
    with contextlib.ExitStack() as until_end:
        copied = Mirror(workdir, until_end)
        with open(copied.folder / "metrics.jsonl", "a") as file:
            bucket.fault = lambda method, path: 403
            file.write("one\n")
            file.flush()
            while "Forbidden" not in (said := capsys.readouterr().err):
                time.sleep(0.01)
            assert "gs://bucket/mirrored cannot be written (Forbidden" in said and "it is tried again" in said
            bucket.fault = lambda method, path: None
            while "mirrored/metrics.jsonl" not in bucket.names():
                time.sleep(0.01)
            file.write("two\n")
            file.flush()
            copied.flush()
            assert bucket.read("mirrored/metrics.jsonl") == b"one\ntwo\n"
            file.write("three\n")
        copied.close()
        assert bucket.read("mirrored/metrics.jsonl") == b"one\ntwo\nthree\n"
    assert not copied.folder.exists()


def test_the_run_that_began_last_owns_the_workdir(bucket):
    workdir = as_path(f"{bucket.url}/owned")
    with contextlib.ExitStack() as until_end:
        earlier, later = Mirror(workdir, until_end), Mirror(workdir, until_end)
        for run_, text in ((earlier, "earlier"), (later, "later")):
            (run_.folder / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="gs://bucket/owned belongs to a run that began later, on .*: this one st"):
            earlier.flush()
        later.close()
    assert bucket.read("owned/metrics.jsonl") == b"later"


def test_a_stored_detector_is_the_one_on_the_disk(tiny_run, stored):
    from deperceiver_jax.models.skeleton import take_apart

    (_, ours, _), (_, theirs, _) = (take_apart(load_detector(str(place), "best")[0]) for place in (stored, tiny_run))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.slow
def test_programs_read_and_write_there(stored, bucket, rectangles, capsys):
    from deperceiver_jax import eval, predict

    assert run(eval.main, ["eval", f"--workdir={stored}", "--checkpoint=3"]) == 0, capsys.readouterr().err
    assert json.loads(bucket.read("stored/eval/3/metrics.json"))["AP"] >= 0
    assert run(eval.main, ["eval", f"--weights={stored}/checkpoints/3", f"--output={bucket.url}/of 3"]) == 0
    assert bucket.read("of 3/detections.json") == bucket.read("stored/eval/3/detections.json")

    for name in ("0.png", "1.png"):
        with open(f"{rectangles.directory}/val2017/{name}", "rb") as file:
            write_whole(as_path(f"{bucket.url}/pictures/deep/{name}"), file.read())
    arguments = [f"--workdir={stored}", "--images", f"{bucket.url}/pictures/deep/*.png", f"--output={bucket.url}/drawn"]
    assert run(predict.main, ["predict", *arguments, "--format=coco,csv,yolo"]) == 0, capsys.readouterr().err
    assert set(bucket.names("drawn/")) >= {"0.png", "1.png", "detections.json", "detections.csv", "classes.txt"}


@pytest.mark.parametrize("place", ["s3://bucket/x", "az://bucket/x", "file:///x"])
def test_other_addresses_are_refused(place, capsys):
    from deperceiver_jax.train import main

    assert run(main, ["train", "--config=demo:deperceiver", f"--workdir={place}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: --workdir is {place}: of addresses with :// only gs:// is known")

"""`deperceiver data prepare`: a data set goes to a bucket and from there to other disks, whole or not at all."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from deperceiver_jax.data.__main__ import main
from deperceiver_jax.data.datasets import bucket_copy
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, write_whole
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.workdir import data_fingerprint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def pictures(coco_folder):
    """Pictures in COCO's layout: five for training, two for validation."""
    for split, count in (("train", 5), ("validation", 2)):
        sizes = {id: (60, 80) for id in range(1, count + 1)}
        boxes = [coco_folder.annotation(id, id, [4, 5, 10 + id, 12]) for id in sizes]
        coco_folder.write(boxes, split=split, sizes=sizes)
    return coco_folder


@pytest.fixture
def prepare(pictures, capsys):
    """Runs the command; gives (status, what it prints, its error)."""

    def of(directory, *arguments):
        fields = [f"--config.data.prepared_directory={pictures.prepared}"]
        status = run(main, ["data", "prepare", str(directory), *fields, *arguments])
        out, err = capsys.readouterr()
        return status, out, next((line for line in err.splitlines() if line.startswith("error: ")), "")

    return of


@pytest.fixture
def place(bucket, request):
    return f"{bucket.url}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def there(prepare, pictures, place):
    """The place, with the data set in it."""
    status, _, error = prepare(pictures.root, f"--to={place}")
    assert status == 0, error
    return place


def below(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_what_arrives_is_the_data_set(pictures, prepare, there, bucket, tmp_path):
    status, out, error = prepare(tmp_path / "host", f"--from={there}")
    assert status == 0, error
    names = {name: bucket.read(name) for name in bucket.names() if name.startswith(f"{there[12:]}/")}
    listed = json.loads(names.pop(f"{there[12:]}/prepared.json"))
    assert {name.partition("/")[2]: content for name, content in names.items()} == below(tmp_path / "host")
    for name, content in below(tmp_path / "host").items():
        checksum = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        assert listed[name] == {"size": len(content), "crc32c": checksum}
    assert f"Copied {len(listed)} of {len(listed)} files" in out

    copied, ours = pictures.config(directory=str(tmp_path / "host")), pictures.config()
    for split in ("train", "validation"):
        found, expected = open_source(copied, split), open_source(ours, split)
        assert data_fingerprint(found) == data_fingerprint(expected)
        assert all(found.image_bytes(i) == expected.image_bytes(i) for i in range(len(expected)))
        assert len(found) < found.bytes_per_image  # as Source says it, which a run multiplies
    assert "Copied 0 of" in prepare(tmp_path / "host", f"--from={there}")[1]
    assert "Copied 0 of" in prepare(pictures.root, f"--to={there}")[1]


def test_a_run_copies_the_data_set_that_its_config_names(pictures, prepare, there, bucket, place, tmp_path, capsys):
    config = pictures.config(directory=there, prepared_directory=str(tmp_path / "host"))
    for split in ("train", "validation"):
        found, expected = open_source(config, split), open_source(pictures.config(), split)
        assert data_fingerprint(found) == data_fingerprint(expected)
        assert all(found.image_bytes(i) == expected.image_bytes(i) for i in range(len(expected)))
    assert capsys.readouterr().out.count("Copied ") == 1
    absent = (f"{place}-none", f"{place}-none has no prepared.json"), ("gs://nowhere/x", "there is no bucket")
    for empty, sentence in absent:
        with pytest.raises(UserError, match=f"config.data.directory: {sentence}"):
            open_source(pictures.config(directory=empty), "train")
    for what in ("check", "prepare"):
        assert run(main, ["data", what, there]) == 1
        assert f"{what}'s DIR is {there}: it is read from a disk of this machine" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["to", "from"])
def test_it_goes_on_where_it_was_cut_off(pictures, prepare, bucket, place, way, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_copy, "AT_ONCE", 1)
    directory = pictures.root
    if way == "from":
        assert prepare(directory, f"--to={place}")[0] == 0
        directory = tmp_path / "host"
    asked = []

    def forbidden(method, path):
        """After three files."""
        if (method == "POST" and "uploadType" in path) if way == "to" else "alt=media" in path:
            asked.append(path)
        return 403 if len(asked) > 3 + (way == "from") else None  # the list was read, too

    bucket.fault = forbidden
    status, _, error = prepare(directory, f"--{way}={place}")
    assert status == 1 and " cannot be copied: Forbidden" in error, error
    assert error.endswith("The same command goes on from there.")
    if way == "to":
        assert "has no prepared.json" in (bucket.mend() or prepare(tmp_path / "early", f"--from={place}"))[2]
    bucket.mend()
    asked.clear()
    bucket.fault = lambda method, path: forbidden(method, path) and None
    status, out, error = prepare(directory, f"--{way}={place}")
    assert status == 0, error
    total = len(json.loads(bucket.read(f"{place[12:]}/prepared.json")))
    assert total > 6 and f"Copied {total - 3} of {total} files" in out
    assert total - 3 < len(asked) < total  # and the list


def test_what_is_cut_or_gone_is_copied_again(prepare, there, tmp_path):
    host = tmp_path / "host"
    prepare(host, f"--from={there}")
    whole = below(host)
    shard = next(host.rglob("*.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # as long as before
    next(host.rglob("index_*.npz")).unlink()
    assert "Copied 2 of" in prepare(host, f"--from={there}")[1]
    assert below(host) == whole


def test_a_host_whose_copy_is_not_whole_does_not_train_on_it(pictures, prepare, there, tmp_path):
    host = tmp_path / "host"
    prepare(host, f"--from={there}")
    next((host / "train").glob("*.array_record*")).unlink()
    sentence = r"host/train is not whole: .*array_record.* is missing; what is missing is copied by: deperceiver data p"
    with pytest.raises(Exception, match=sentence):
        open_source(pictures.config(directory=str(host)), "train")
    with pytest.raises(Exception, match="has no split 'test'; what was copied there has train and validation"):
        open_source(pictures.config(directory=str(host)), "test")
    assert run(main, ["data", "check", str(host)]) == 1


def test_a_damaged_object_is_told_and_mended(pictures, prepare, there, bucket, tmp_path):
    shard = next(name for name in bucket.names(f"{there[12:]}/") if "array_record" in name)
    whole = bucket.read(f"{there[12:]}/{shard}")
    write_whole(as_path(f"{there}/{shard}"), whole[:-1] + b"x")
    status, _, error = prepare(tmp_path / "host", f"--from={there}")
    assert status == 1
    assert f"{there}/{shard} is damaged: its size or checksum is not that of {there}/prepared.json" in error
    assert not (tmp_path / "host" / shard).exists()
    assert "Copied 1 of" in prepare(pictures.root, f"--to={there}")[1]
    assert bucket.read(f"{there[12:]}/{shard}") == whole
    assert prepare(tmp_path / "host", f"--from={there}")[0] == 0

    bucket.delete(f"{there[12:]}/{shard}")
    assert f"{shard} is gone from {there}/prepared.json" in prepare(tmp_path / "other", f"--from={there}")[2]


def test_what_is_damaged_on_its_way_is_told(prepare, there, bucket, tmp_path):
    shard = next(name for name in bucket.names(f"{there[12:]}/") if "array_record" in name)
    bucket.spoil(f"{there[12:]}/{shard}")
    status, _, error = prepare(tmp_path / "host", f"--from={there}")
    assert status == 1 and f"{there}/{shard} arrived 3 times with a checksum that is not the bucket's." in error
    assert shard not in below(tmp_path / "host")
    assert not [name for name in below(tmp_path / "host") if name.endswith(".partial")]


def test_another_data_set_is_not_mixed_with_the_first(pictures, prepare, there, bucket):
    before = {name: bucket.read(name) for name in bucket.names()}
    pictures.write([], sizes={1: (40, 40)})
    status, _, error = prepare(pictures.root, f"--to={there}")
    assert status == 1 and f"{there} has another prepared data set" in error
    assert {name: bucket.read(name) for name in bucket.names()} == before


def test_processes_share_it(pictures, prepare, bucket, place, tmp_path):
    """Each copies its range; the one that is done last completes it."""
    assert "The last process to be done writes" in prepare(pictures.root, f"--to={place}", "--share=1/2")[1]
    first = set(bucket.names(f"{place[12:]}/"))
    assert "prepared.json lists all" in prepare(pictures.root, f"--to={place}", "--share=0/2")[1]
    total = set(bucket.names(f"{place[12:]}/")) - {"prepared.json"}
    assert 0 < len(first) < len(total)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    prepare(shared, f"--from={place}", "--share=0/2")
    assert 0 < len(below(shared)) < len(total)
    prepare(shared, f"--from={place}", "--share=1/2")
    prepare(alone, f"--from={place}")
    assert below(shared) == below(alone)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to=gs://nowhere/x"], "--to: there is no bucket gs://nowhere."),
        (["--from=gs://nowhere/x"], "--from: there is no bucket gs://nowhere."),
        (
            ["--from=gs://bucket/nothing"],
            "--from: gs://bucket/nothing has no prepared.json, which is there",
        ),
        (["--to=/tmp/x"], "--to is /tmp/x; it is a folder of a bucket, as in gs://my-bucket/coco."),
        (["--to=s3://bucket/x"], "--to is s3://bucket/x: of addresses with :// only gs:// is known"),
        (["--to=gs://bucket/x", "--from=gs://bucket/x"], "--to and --from are given; what is copied goes one way."),
        (["--from=gs://bucket/x", "--share=2/2"], "--share is '2/2'; it is I/N"),
        (["--share=0/2"], "--share needs --to or --from"),
        (["--decode"], "--decode is none of prepare's flags, which are --to, --from, --share."),
        (["--config.data.name=shapes"], "config.data.name is 'shapes'; prepare looks at folders"),
    ],
)
def test_mistakes_are_one_sentence(prepare, bucket, arguments, sentence, tmp_path):
    status, _, error = prepare(tmp_path / "host", *arguments)
    assert status == 1 and error.startswith(f"error: {sentence}"), error
    assert not (tmp_path / "host").exists()


def test_a_forbidden_bucket_is_told_before_anything_is_prepared(pictures, prepare, bucket):
    bucket.rights = ["storage.objects.list", "storage.objects.get"]
    error = prepare(pictures.root, "--to=gs://bucket/x")[2]
    lacking = "gs://bucket does not permit storage.objects.create, storage.objects.delete."
    assert error == f"error: --to: gs://bucket/x cannot be written: {lacking}"
    bucket.fault = lambda method, path: 403
    assert "--to: gs://bucket/x cannot be read: Forbidden" in prepare(pictures.root, "--to=gs://bucket/x")[2]
    assert "--from: gs://bucket/x cannot be read: Forbidden" in prepare(pictures.root, "--from=gs://bucket/x")[2]
    assert not pictures.prepared.exists()


def test_a_list_that_leads_elsewhere_is_refused(prepare, bucket, place, tmp_path):
    for name in ("../x", "/x", "train//x"):
        write_whole(as_path(f"{place}/prepared.json"), json.dumps({name: {"size": 1, "crc32c": "x"}}))
        assert f"prepared.json lists {name!r}, which is not" in prepare(tmp_path / "host", f"--from={place}")[2]
    write_whole(as_path(f"{place}/prepared.json"), "[]")
    assert "prepared.json is not a list that `--to` has written." in prepare(tmp_path, f"--from={place}")[2]


def test_a_disk_that_is_too_small_is_told_at_once(prepare, there, tmp_path, monkeypatch):
    usage = type("", (), {"free": 10})
    monkeypatch.setattr(bucket_copy.shutil, "disk_usage", lambda place: usage)
    error = prepare(tmp_path / "host", f"--from={there}")[2]
    assert "has too little room: " in error and error.endswith("and 0.0 MB are free.")
    assert not below(tmp_path / "host")


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_files_alone(prepare, there, bucket, tmp_path):
    """SIGKILL while the bucket is in the middle of an answer; the next one goes on, and the bits are the same."""
    held, go_on = threading.Event(), threading.Event()

    def hold(method, path):
        if "alt=media" in path and "array_record" in path:
            held.set()
            go_on.wait(60)

    bucket.fault = hold
    command = [sys.executable, "-m", "deperceiver_jax", "data", "prepare", str(tmp_path / "host"), f"--from={there}"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | bucket.variables, stderr=subprocess.PIPE)
    try:
        assert held.wait(120)
        time.sleep(0.2)
    finally:
        process.kill()
        process.communicate()
        go_on.set()
    assert process.returncode == -signal.SIGKILL
    listed = json.loads(bucket.read(f"{there[12:]}/prepared.json"))
    left = {name: content for name, content in below(tmp_path / "host").items() if not name.endswith(".partial")}
    assert 0 < len(left) < len(listed) and not [name for name in left if "array_record" in name]
    bucket.mend()
    status, out, error = prepare(tmp_path / "host", f"--from={there}")
    assert status == 0 and f"Copied {len(listed) - len(left)} of {len(listed)} files" in out, error
    expected = {name: bucket.read(f"{there[12:]}/{name}") for name in listed}
    assert below(tmp_path / "host") == expected
    assert np.all([len(content) for content in expected.values()])

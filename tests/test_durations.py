"""What durations.json says is of tests that exist, and a run adds to it what it found."""

import json
from types import SimpleNamespace

import pytest

from tests import durations


def test_every_record_is_of_a_test_that_exists():
    for test in durations.read():
        file, _, name = test.partition("::")
        text = (durations.FILE.parent.parent / file).read_text()
        assert f"def {name.partition('[')[0]}(" in text, f"{test} is gone: make test RECORD=1"


def test_a_run_replaces_what_it_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(durations, "FILE", tmp_path / "durations.json")
    for name in ("PYTEST_XDIST_WORKER", durations.RECORD):
        monkeypatch.delenv(name, raising=False)
    before = {"tests/a.py::elsewhere": 5.0, "tests/a.py::faster": 2.0}
    durations.FILE.write_text(json.dumps(before))
    recorder = durations.Recorder()
    reports = [("a.py::faster", 0.3), ("a.py::long", 0.7), ("a.py::long", 0.5), ("b.py::short", 0.4)]
    for name, seconds in reports:
        recorder.add(SimpleNamespace(nodeid=f"tests/{name}", duration=seconds))
    recorder.write()
    assert durations.read() == before  # make did not ask for it
    monkeypatch.setenv(durations.RECORD, "1")
    recorder.write()
    assert durations.read() == {"tests/a.py::elsewhere": 5.0, "tests/a.py::long": pytest.approx(1.2)}


def test_long_files_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(durations, "FILE", tmp_path / "durations.json")
    durations.FILE.write_text(json.dumps({"tests/a.py::x": 2.0, "tests/b.py::x": 5.0}))
    items = [SimpleNamespace(nodeid=f"tests/{name}.py::{test}") for name in "cabd" for test in "xy"]
    durations.order(items, [item for item in items if item.nodeid.startswith("tests/d")])
    assert [item.nodeid[6] for item in items] == list("bbddaacc")

"""A run that is killed again and again ends with the bits of one that never was; other faults end in a sentence."""

import os
import resource
import signal
from pathlib import Path

import pytest

from tests.train_process import Run, arrays_of, last_line, lines_of, names_of, newest

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def shared(rectangles, tmp_path_factory):
    """Overrides that every run here has."""
    return [
        f"--config.data.directory={rectangles.directory}",
        f"--config.data.prepared_directory={rectangles.prepared_directory}",
        f"--config.train.compilation_cache={tmp_path_factory.mktemp('compiled')}",
        "--config.train.log_every=3",
        "--config.train.eval_every=20",
    ]


def kill_when(workdir: Path, shared: list[str], condition, what: str) -> None:
    """Kills a run at a moment when `condition` holds, and tries again if it was over before the signal came."""
    for _ in range(5):
        run = Run(workdir, shared)
        run.wait_for(condition, what)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
        if condition():
            return
    pytest.fail(f"No kill came while there was {what}.")


def test_kills_and_signals_leave_no_trace(shared, tmp_path):
    shared = [*shared, f"--config.train.num_steps={STEPS}", "--config.train.checkpoint_every=5"]
    whole = Run(tmp_path / "whole", shared)
    status, out, err = whole.end()
    assert status == 0, err
    assert out.startswith("Training deperceiver") and f"steps 1 to {STEPS}." in out

    workdir = tmp_path / "killed"

    def saving():  # a save has another name until it is complete; lines after the one before will be written again
        return any(not name.isdigit() for name in names_of(workdir)) and last_line(workdir) > newest(workdir) > 0

    kill_when(workdir, shared, lambda: (workdir / "config.json").exists() and not names_of(workdir), "nothing saved")
    kill_when(workdir, shared, saving, "a save under way")

    run, start = Run(workdir, shared), newest(workdir)
    run.wait_for(lambda: newest(workdir) > start, "a checkpoint of its own")
    status, out, err = run.end(signal.SIGTERM)
    assert status == 0, err
    last = newest(workdir)
    assert start < last < STEPS
    assert f"Stopped: the same command continues after step {last} of {STEPS}" in out

    run = Run(workdir, shared)
    status, out, err = run.end()
    assert status == 0, err
    assert f"steps {last + 1} to {STEPS}." in out.splitlines()[0]

    expected, found = arrays_of(tmp_path / "whole", STEPS), arrays_of(workdir, STEPS)
    assert expected.keys() == found.keys()
    assert {name.split("/")[0] for name in found} == {"weights", "ema", "training"}
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name
    assert lines_of(workdir) == lines_of(tmp_path / "whole")
    for step in ("20", str(STEPS)):
        for name in ("metrics.json", "detections.json"):
            files = [directory / "eval" / step / name for directory in (workdir, tmp_path / "whole")]
            assert files[0].read_bytes() == files[1].read_bytes()
    assert all(name.isdigit() for name in names_of(workdir))


def children(pid: int) -> dict[int, str]:
    """{pid: command line} of the processes that `pid` has started."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
            found[int(path.name)] = (path / "cmdline").read_text()
    return found


def test_a_loader_process_that_dies_ends_a_run_with_a_sentence(shared, tmp_path):
    endless = [*shared, "--config.train.num_steps=100000", "--config.train.eval_every=-1"]
    endless += ["--config.train.checkpoint_every=20", "--config.train.log_every=100000"]

    run = Run(tmp_path, [*endless, "--config.data.num_workers=1"])
    run.wait_for(lambda: newest(tmp_path) > 0, "a checkpoint")
    workers = [pid for pid, command in children(run.pid).items() if "spawn_main" in command]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    status, _, err = run.end()
    assert status == 1
    assert err.splitlines()[-1].startswith("error: A loader process died (") and err.count("error: ") == 1, err


def test_a_disk_that_is_full_ends_a_run_with_a_sentence(shared, tmp_path):
    """A run that continues may write no file beyond 16 kB, and so no checkpoint.

    From its start: where a save is under way, its failure is loud (`Checkpoints._require_space`).
    """
    endless = [*shared, "--config.train.num_steps=100000", "--config.train.eval_every=-1"]
    endless += ["--config.train.checkpoint_every=20", "--config.train.log_every=100000"]
    run = Run(tmp_path, endless)
    run.wait_for(lambda: newest(tmp_path) > 0, "a checkpoint")
    assert run.end(signal.SIGTERM)[0] == 0
    run = Run(tmp_path, endless)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    status, out, err = run.end()
    kept = newest(tmp_path)
    assert status == 1
    sentence = f"error: A checkpoint cannot be written to {tmp_path}/checkpoints: File too large (it needs "
    last = err.splitlines()[-1]
    assert last.startswith(sentence) and last.endswith(f" MB); the newest one there is of step {kept}."), err
    assert "Traceback" not in err, err
    assert kept > 0
    assert arrays_of(tmp_path, kept)["training/step"] == kept

"""A run that is killed again and again ends with the bits of one that never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


class Run:
    """train.py as a process of its own on one device; `shared` is what all runs here have in common."""

    def __init__(self, workdir: Path, shared: list[str]):
        self.workdir = workdir
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self.process = subprocess.Popen(
            [sys.executable, "train.py", "--config=tests/tiny_training.py", f"--workdir={workdir}", *shared],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.001)

    def end(self, signum: int | None = None) -> tuple[int, str, str]:
        """(status, stdout, stderr) of the process, after `signum` or of its own accord."""
        if signum is not None:
            self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def names_of(workdir: Path) -> list[str]:
    """What is in checkpoints/: steps, and under longer names what is not complete."""
    return os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").is_dir() else []


def newest(workdir: Path) -> int:
    return max((int(name) for name in names_of(workdir) if name.isdigit()), default=0)


def lines_of(workdir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without the one number that may differ."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    for row in rows:
        row.pop("images_per_second", None)
    return rows


def last_line(workdir: Path) -> int:
    return max((row["step"] for row in lines_of(workdir)), default=0)


def kill_when(workdir: Path, shared: list[str], condition, what: str) -> None:
    """Kills a run at a moment when `condition` holds, and tries again if it was over before the signal came."""
    for _ in range(5):
        run = Run(workdir, shared)
        run.wait_for(condition, what)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
        if condition():
            return
    pytest.fail(f"No kill came while there was {what}.")


def arrays_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by "item/path"."""
    found = {}
    for item in ("weights", "ema", "training"):
        handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(workdir / "checkpoints" / str(step) / item)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        flat = ocp.tree.to_flat_dict(tree, sep="/")
        found |= {f"{item}/{name}": np.asarray(array) for name, array in flat.items() if array is not None}
    return found


@pytest.mark.slow
def test_kills_and_signals_leave_no_trace(rectangles, tmp_path):
    shared = [
        f"--config.data.directory={rectangles.directory}",
        f"--config.data.prepared_directory={rectangles.prepared_directory}",
        f"--config.train.compilation_cache={tmp_path / 'compiled'}",
        f"--config.train.num_steps={STEPS}",
        "--config.train.log_every=3",
        "--config.train.checkpoint_every=5",
        "--config.train.eval_every=20",
    ]
    whole = Run(tmp_path / "whole", shared)
    status, out, err = whole.end()
    assert status == 0, err
    assert out.startswith("Training deperceiver") and f"steps 1 to {STEPS}." in out

    workdir = tmp_path / "killed"

    def saving():  # a save has another name until it is complete
        return any(not name.isdigit() for name in names_of(workdir))

    def ahead_of_the_checkpoint():  # with lines that will be written again
        return last_line(workdir) > newest(workdir) > 0

    kill_when(workdir, shared, lambda: (workdir / "config.json").exists() and not names_of(workdir), "nothing saved")
    kill_when(workdir, shared, saving, "a save under way")
    kill_when(workdir, shared, ahead_of_the_checkpoint, "a line after the checkpoint")

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

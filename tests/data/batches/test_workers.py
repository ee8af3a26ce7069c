"""Worker processes: what becomes of them when they, their consumer or their parent end, however that comes about."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from deperceiver_jax.data.batches import workers
from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.batches.workers import SHARED_MEMORY
from deperceiver_jax.errors import UserError
from deperceiver_jax.structures import Batch
from tests.data.batches.test_loader import SHAPES, _config
from tests.data.fake_source import FakeSource

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = """
    import itertools, os, signal, sys
    from deperceiver_jax.data.batches.loader import TrainBatches
    from tests.data.fake_source import FakeSource
    from tests.data.batches.test_loader import SHAPES, _config

    if __name__ == "__main__":
        batches = iter(TrainBatches(FakeSource(SHAPES), _config(num_workers=2), seed=0))
        held = [next(batches) for _ in range(5)]
        mine = f"deperceiver_jax-{os.getpid()}-"
        print(*(name for name in os.listdir("/dev/shm") if name.startswith(mine)), flush=True)
        {end}
"""


def _run(tmp_path, end):
    """Runs the program, whose last line is `end`, with warnings as errors."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("{end}", end))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", str(program)], capture_output=True, text=True, env=environment, timeout=120
    )


def _left_in_shared_memory(directories):
    """Which of these directories are still there after a while."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = [name for name in directories if os.path.exists(os.path.join(SHARED_MEMORY, name))]
        if not left:
            return []
        time.sleep(0.1)
    return left


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("batches.close()", 0),
        ("sys.exit(3)", 3),  # with batches in hand and workers at work
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.killpg(0, signal.SIGTERM) if os.setpgid(0, 0) is None else None", -signal.SIGTERM),
    ],
    ids=["closed", "exit", "killed", "group terminated"],
)
def test_nothing_is_left_behind(tmp_path, end, status):
    done = _run(tmp_path, end)
    assert done.returncode == status
    assert done.stderr == ""
    directories = done.stdout.split()
    assert directories and _left_in_shared_memory(directories) == []


def test_a_dead_worker_is_an_error_and_not_a_hang():
    source = FakeSource(SHAPES, deadly=7)
    with pytest.raises(UserError, match=r"A loader process died .*exit code -9.*config\.data\.num_workers"):
        for _ in TrainBatches(source, _config(num_workers=2), seed=0):
            pass


def test_where_shared_memory_is_full_frames_are_files(monkeypatch, tmp_path, capsys):
    """A container has 64 MB of it, and a worker that writes beyond is killed. One of all workers tells."""
    directories = [str(tmp_path / name) for name in ("shared", "spare")]
    make_file = workers._make_file

    def full(path, size):
        if path.startswith(directories[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return make_file(path, size)

    def make(step, empty):
        image = empty((1, 2, 4, 3))
        image[:] = step
        none = np.zeros((1, 2), np.int32)
        return Batch(image, none, none, none[:, 0], np.zeros((1, 0, 4), np.float32), none[:, :0], none[:, :0] > 0)

    for directory in directories:
        os.mkdir(directory)
    monkeypatch.setattr(workers, "_make_file", full)
    worker = workers._InWorker(make, directories, 24)
    sent = [worker(3), worker(4)]
    monkeypatch.setattr(workers.os, "getpid", lambda: 7)  # another worker
    sent.append(workers._InWorker(make, directories, 24)(5))
    assert [os.path.dirname(each.path) for each in sent] == [directories[1]] * 3
    assert (workers._open_frame(sent[2], {}) == 5).all()
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path} is full, and pictures go through files in {tmp_path}.")
    assert error.count("\n") == 1


def test_room_for_a_frame_is_taken_or_nothing_is_there(tmp_path, monkeypatch):
    assert os.stat(workers._make_file(str(tmp_path / "a"), 5000)).st_blocks * 512 >= 5000

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        workers._make_file(str(tmp_path / "b"), 5000)
    assert not (tmp_path / "b").exists()


def test_batches_in_hand_are_not_drawn_over():
    """Memory that a consumer, or only a view of it, still refers to is not used again; other memory is."""
    iterator = iter(TrainBatches(FakeSource(SHAPES), _config(num_workers=1), seed=0))
    held = [next(iterator).image[1:] for _ in range(3)]
    copies = [image.copy() for image in held]
    addresses = set()
    for _ in range(12):
        addresses.add(next(iterator).image.__array_interface__["data"][0])
    iterator.close()
    for image, copy in zip(held, copies, strict=True):
        np.testing.assert_array_equal(image, copy)
    assert len(addresses) < 8
    assert not addresses & {image.base.__array_interface__["data"][0] for image in held}

"""Steps and checkpoints of two processes with two devices each: told to leave, killed, continued, and beside one."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deperceiver_jax.program import processes
from deperceiver_jax.program.command_line import run
from deperceiver_jax.program.shutdown import Shutdown
from deperceiver_jax.runs.checkpoint_files import all_steps
from deperceiver_jax.sharding import shard_batch
from deperceiver_jax.training.checkpoint import Checkpoints, newest_whole
from tests.processes import Forked, free_address
from tests.train_process import arrays_of
from tests.training.conftest import Tiny, tiny_batch

pytestmark = pytest.mark.slow


def program(process: int, address: str, workdir: Path, last: int, signum: int) -> int:
    """What each of the two does."""
    return run(lambda argv: _train(process, address, workdir, last, signum))


def _train(process: int, address: str, workdir: Path, last: int, signum: int) -> None:
    by_hand = dict(coordinator_address=address, process_count=2, process_id=process)
    processes.join(SimpleNamespace(distributed=None, **by_hand), {})
    tiny, rows = Tiny(4, ema_decay=0.5, queries=3, backend="scipy"), {}
    start, _ = newest_whole(workdir)
    checkpoints, shutdown = Checkpoints(workdir, keep=2), Shutdown()
    state = checkpoints.restore(start, tiny.plan.abstract)[0] if start else tiny.plan.initialize()
    with checkpoints:
        for step in range(start + 1, last + 1):
            if shutdown.before(step):
                break
            rows_here = slice(4 * process, 4 * process + 4)
            batch = jax.tree.map(lambda x, rows=rows_here: x[rows], tiny_batch(step - 1))
            state, metrics = tiny.step(state, shard_batch(batch, tiny.mesh))
            rows[step] = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if step == 2:
                checkpoints.save(state, {"process": process})
                checkpoints.latest_step()  # waits
            if step == 4 and process == 1 and signum:
                os.kill(os.getpid(), signum)
        checkpoints.save(state, {"process": process})
    (workdir / f"rows.{process}").write_text(json.dumps(rows))


def ends_of_two(workdir: Path, last: int, signum: int = 0) -> list[tuple[int, str]]:
    """(status, stderr) of both; after step 4 the second one sends `signum` to itself."""
    workdir.mkdir(exist_ok=True)
    address = free_address()
    pair = [Forked(program, process, address, workdir, last, signum, devices=2) for process in range(2)]
    return [(status, errors) for status, _, errors in (process.end() for process in pair)]


def test_two_processes_train_save_and_leave_as_one(tiny, tmp_path):
    """A SIGTERM to one of them makes both leave after the same step, and save it once. After a SIGKILL of one the other
    ends with a sentence, and a run that continues from the checkpoint ends with the bits of the one before."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for status, errors in ends_of_two(whole, 100000, signal.SIGTERM):
        assert status == 0, errors
    first, second = (json.loads((whole / f"rows.{process}").read_text()) for process in range(2))
    assert first == second and len(first) >= 4
    last = len(first)

    (status, errors), (killed_status, _) = ends_of_two(killed, 100000, signal.SIGKILL)
    assert (status, killed_status) == (1, -signal.SIGKILL), errors
    assert errors.splitlines()[-1].startswith("error: Another process of this run ended or cannot be reached ("), errors
    assert all_steps(killed) == [2]
    for status, errors in ends_of_two(killed, last):
        assert status == 0, errors
    continued = json.loads((killed / "rows.0").read_text())
    assert continued == {step: row for step, row in first.items() if int(step) > 2}
    expected, found = arrays_of(whole, last), arrays_of(killed, last)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name

    alone = tiny(1, ema_decay=0.5, queries=3, backend="scipy")
    checkpoints = Checkpoints(whole, keep=2)
    restored, progress = checkpoints.restore(last, alone.plan.abstract)
    checkpoints.close()
    state, rows = alone.train(alone.plan.initialize(), 0, last)
    assert progress == {"process": 0}
    for here, there in zip(rows, first.values(), strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), restored, state)

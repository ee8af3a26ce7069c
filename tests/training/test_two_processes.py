"""Steps and checkpoints of two processes with two devices each: told to leave, killed, continued, and beside one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deperceiver_jax.runs.checkpoint_files import all_steps
from deperceiver_jax.training.checkpoint import Checkpoints
from tests.quick_compile import quick_flags
from tests.train_process import arrays_of

pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import jax
from deperceiver_jax.program import processes
from deperceiver_jax.program.command_line import run
from deperceiver_jax.sharding import shard_batch
from deperceiver_jax.training.checkpoint import Checkpoints, newest_whole
from deperceiver_jax.program.shutdown import Shutdown
from tests.training.conftest import Tiny, tiny_batch

process, address, workdir, last, signum = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:])

def main(argv):
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
            batch = jax.tree.map(lambda x: x[rows_here], tiny_batch(step - 1))
            state, metrics = tiny.step(state, shard_batch(batch, tiny.mesh))
            rows[step] = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if step == 2:
                checkpoints.save(state, {"process": process})
                checkpoints.latest_step()  # waits
            if step == 4 and process == 1 and signum:
                os.kill(os.getpid(), signum)
        checkpoints.save(state, {"process": process})
    (workdir / f"rows.{process}").write_text(json.dumps(rows))

sys.exit(run(main))
"""


def ends_of_two(workdir: Path, last: int, signum: int = 0) -> list[tuple[int, str]]:
    """(status, stderr) of both; after step 4 the second one sends `signum` to itself."""
    workdir.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": quick_flags(2), "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), address, str(workdir), str(last), str(signum)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in pair]
    return [(process.returncode, text) for process, text in zip(pair, errors, strict=True)]


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

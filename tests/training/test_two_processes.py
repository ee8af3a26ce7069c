"""Steps and checkpoints of two processes, each with its half of every batch, against the same in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deperceiver_jax.training.checkpoint import Checkpoints

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import jax

process, address, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(address, 2, process)
from deperceiver_jax.sharding import shard_batch
from deperceiver_jax.training.checkpoint import Checkpoints
from deperceiver_jax.training.shutdown import Shutdown
from tests.training.conftest import Tiny, tiny_batch

run = Tiny(2, ema_decay=0.5, queries=3, backend="scipy")
state, shutdown, checkpoints, rows = run.plan.initialize(), Shutdown(), Checkpoints(workdir, keep=2), []
for step in range(1, 100000):
    if shutdown.before(step):
        break
    rows_here = slice(4 * process, 4 * process + 4)
    batch = jax.tree.map(lambda x: x[rows_here], tiny_batch(step - 1))
    state, metrics = run.step(state, shard_batch(batch, run.mesh))
    rows.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    if step == 3 and process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
checkpoints.save(state, {"process": process})
checkpoints.close()
(workdir / f"rows.{process}").write_text(json.dumps(rows))
"""


@pytest.mark.slow
def test_two_processes_train_save_and_leave_as_one(tiny, tmp_path):
    """A SIGTERM to one of them makes both leave after the same step, and save it once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), address, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in pair:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"rows.{process}").read_text()) for process in range(2))
    assert first == second and len(first) >= 3

    alone = tiny(1, ema_decay=0.5, queries=3, backend="scipy")
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored, progress = checkpoints.restore(len(first), alone.plan.abstract)
    checkpoints.close()
    state, rows = alone.train(alone.plan.initialize(), 0, len(first))
    assert progress == {"process": 0}
    for here, there in zip(rows, first, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), restored, state)

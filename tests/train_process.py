"""train.py as real processes, one or several that make one run, and what they leave in a workdir."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tests.quick_compile import quick_flags

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that anything may take


class Run:
    """train.py on `devices` of each of `count` processes; `shared` is what all runs of a test have in common."""

    def __init__(
        self,
        workdir: Path | str,
        shared: list[str],
        *,
        count: int = 1,
        devices: int = 1,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        self.workdir = workdir
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(devices), **variables}
        command = [sys.executable, "train.py", "--config=tests/tiny_training.py", f"--workdir={workdir}", *shared]
        joins = [[]]
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            same = [f"--coordinator_address={address}", f"--process_count={count}"]
            joins = [[*same, f"--process_id={index}"] for index in range(count)]
        self.processes = [
            subprocess.Popen(
                [*command, *join],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for join in joins
        ]
        self.process = self.processes[0]

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no {what}: {self.ends(signal.SIGKILL)}")
            time.sleep(0.001)

    def end(self, signum: int | None = None) -> tuple[int, str, str]:
        """`ends` of the first process."""
        return self.ends(signum)[0]

    def ends(self, signum: int | None = None) -> list[tuple[int, str, str]]:
        """(status, stdout, stderr) of every process, after `signum` to all of them or of their own accord."""
        for process in self.processes if signum is not None else []:
            process.send_signal(signum)
        texts = [process.communicate(timeout=PATIENCE) for process in self.processes]
        return [(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]


def names_of(workdir: Path) -> list[str]:
    """What is in checkpoints/: steps, and under longer names what is not complete."""
    return os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").is_dir() else []


def newest(workdir: Path) -> int:
    return max((int(name) for name in names_of(workdir) if name.isdigit()), default=0)


def lines_of(workdir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without the numbers that may differ."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    for row in rows:
        for name in ("images_per_second", "host_memory_gib"):
            row.pop(name, None)
    return rows


def last_line(workdir: Path) -> int:
    return max((row["step"] for row in lines_of(workdir)), default=0)


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

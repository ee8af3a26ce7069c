"""train.py as real processes, one or several that make one run, and what they leave in a workdir."""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from deperceiver_jax.program.command_line import run
from deperceiver_jax.train import main
from tests.processes import PATIENCE, Forked, free_address


class Run:
    """train.py on `devices` of each of `count` processes; `shared` is what all runs of a test have in common."""

    def __init__(
        self,
        workdir: Path | str,
        shared: list[str],
        *,
        count: int = 1,
        devices: int = 1,
        variables: Mapping[str, str] | None = None,
    ):
        arguments = ["train.py", "--config=tests/patches_training.py", f"--workdir={workdir}", *shared]
        joins = [[]]
        if count > 1:
            same = [f"--coordinator_address={free_address()}", f"--process_count={count}"]
            joins = [[*same, f"--process_id={index}"] for index in range(count)]
        self.processes = [
            Forked(run, main, [*arguments, *join], devices=devices, variables=variables) for join in joins
        ]
        self.pid = self.processes[0].pid

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if any(process.ended for process in self.processes) or time.monotonic() > deadline:
                raise AssertionError(f"no {what}: {self.ends(signal.SIGKILL)}")
            time.sleep(0.001)

    def end(self, signum: int | None = None) -> tuple[int, str, str]:
        """`ends` of the first process."""
        return self.ends(signum)[0]

    def ends(self, signum: int | None = None) -> list[tuple[int, str, str]]:
        """(status, stdout, stderr) of every process, after `signum` to all of them or of their own accord."""
        if signum is not None:
            for process in self.processes:
                process.send(signum)
        return [process.end() for process in self.processes]


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

"""Processes of their own for tests: forked from one in which everything is imported and no JAX has begun.

An import takes a third of a short run. What such a process does not show is how Python itself starts and ends.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.quick_compile import quick_flags

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that anything may take
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deperceiver_jax.training.train", "tests.train_process"])


class Forked:
    """`function(*arguments)`, which answers with a status, on `devices` simulated devices.

    `variables` join those of the environment. The function belongs to a module, and its arguments can be pickled.
    """

    def __init__(self, function: Callable, *arguments, devices: int = 1, variables: Mapping[str, str] | None = None):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(devices)} | (variables or {})
        self._output = tempfile.TemporaryDirectory()
        self._process = CONTEXT.Process(target=_run, args=(function, arguments, environment, Path(self._output.name)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def send(self, signum: int) -> None:
        if not self.ended:
            os.kill(self.pid, signum)

    def end(self) -> tuple[int, str, str]:
        """(status, stdout, stderr); the status of a process that a signal ended is the signal's, negative."""
        self._process.join(PATIENCE)
        overdue = not self.ended
        if overdue:
            self.send(signal.SIGKILL)
            self._process.join()
        with self._output:
            out, err = ((Path(self._output.name) / name).read_text() for name in ("out", "err"))
        assert not overdue, f"a process did not end: {out}{err}"
        return self._process.exitcode, out, err


def _run(function: Callable, arguments: tuple, environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), descriptor)
    status = function(*arguments)
    atexit._run_exitfuncs()  # which a forked process leaves out: with one, JAX takes leave of the other processes
    sys.exit(status)


def free_address() -> str:
    """At which processes of one run can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"

"""How long steps take, and which host to look at when one takes much longer than the others."""

import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

Loaded = TypeVar("Loaded")
SLOW = 10  # times the median
AT_LEAST = 1.0  # seconds; what is shorter is no reason to look
KNOWN = 20  # steps that a median is of, at least


class Pace:
    """Times the steps of a loop over `steps`, but for those that say `skip`.

    A slow host makes all hosts wait, in the next sum of gradients. So the first process tells of every slow step, and
    each other one of those of which it waited for its own pictures half the time.
    """

    def __init__(self):
        self._seconds = deque[float](maxlen=100)
        self._skips = False

    def over(self, steps: Iterable[int], stream: Iterable[Loaded]) -> Iterator[tuple[int, Loaded]]:
        """(step, what was loaded for it). Until the next one is asked for, that step goes on."""
        began = time.perf_counter()
        for step, loaded in zip(steps, stream, strict=False):
            waited = time.perf_counter() - began
            yield step, loaded
            took = time.perf_counter() - began
            if not self._skips:
                self._judge(step, took, waited)
            self._skips = False
            began = time.perf_counter()

    def skip(self) -> None:
        """This step has an evaluation or a checkpoint, which takes what it takes."""
        self._skips = True

    def _judge(self, step: int, took: float, waited: float) -> None:
        median = statistics.median(self._seconds) if len(self._seconds) >= KNOWN else took
        self._seconds.append(took)
        if took < max(SLOW * median, AT_LEAST) or (jax.process_index() and waited < took / 2):
            return
        host = socket.gethostname()
        times = f"{took:.1f} s, {took / median:.0f} times the median"
        print(
            f"warning: step {step} took {times}; of it {host} waited {waited:.1f} s for its pictures.",
            file=sys.stderr,
            flush=True,
        )

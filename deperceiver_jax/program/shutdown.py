"""Leaving at a good moment: SIGTERM, which clusters send before they take a machine away, and Ctrl-C."""

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class LeaveNow(BaseException):
    """Raised by a signal where `Shutdown.interrupts` allows it."""


class Shutdown:
    """Notes SIGTERM and the first SIGINT, so that the loop saves and leaves; a second one ends the process at once.

    With several processes, JAX notes SIGTERM and makes all of them agree on the step to leave after.
    """

    def __init__(self):
        self.requested = False
        self._may_interrupt = False
        if jax.process_count() == 1:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame) -> None:
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)
        if self._may_interrupt:
            raise LeaveNow

    def before(self, step: int) -> bool:
        """Whether to leave before `step`; the same answer in all processes."""
        return self.requested or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block that a signal may cut short, because nothing is lost: it is done again by the run that continues."""
        self._may_interrupt = True
        try:
            yield
        except LeaveNow:
            pass
        finally:
            self._may_interrupt = False

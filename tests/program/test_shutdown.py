"""Signals: noted once, deadly the second time, and cutting short only what may be cut short."""

import os
import signal

import pytest

from deperceiver_jax.program.shutdown import Shutdown


@pytest.fixture
def shutdown():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield Shutdown()
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_deadly(shutdown, signum):
    assert not shutdown.before(1)
    os.kill(os.getpid(), signum)
    assert shutdown.before(2)
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_only_an_evaluation_is_cut_short(shutdown):
    reached = []
    with shutdown.interrupts():
        reached.append("within")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
    assert reached == ["within"] and shutdown.requested

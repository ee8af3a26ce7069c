"""Which steps are called slow, and by whom."""

import socket

import pytest

from deperceiver_jax.training import pace
from deperceiver_jax.training.pace import Pace


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def run(clock, loading, stepping, skipped=()):
    """Steps from 1 on that load and step for so many seconds each."""

    def stream():
        for seconds in loading:
            clock.now += seconds
            yield seconds

    times = Pace()
    for step, _ in times.over(range(1, len(loading) + 1), stream()):
        clock.now += stepping[step - 1]
        if step in skipped:
            times.skip()


@pytest.mark.parametrize(("process", "told"), [(0, [31, 34]), (1, [34])])
def test_a_step_of_ten_times_the_median_is_told_with_the_host(clock, monkeypatch, capsys, process, told):
    """31 waits for another host, 32 has a checkpoint, 33 takes nine times the median, 34 waits for its pictures."""
    monkeypatch.setattr("jax.process_index", lambda: process)
    loading, stepping = [0.125] * 40, [0.375] * 40
    stepping[30], stepping[31], stepping[32], loading[33] = 7.5, 99.0, 4.375, 6.0
    run(clock, loading, stepping, skipped=[32])
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[2]) for line in lines] == told
    host = socket.gethostname()
    assert lines[-1] == f"warning: step 34 took 6.4 s, 13 times the median; of it {host} waited 6.0 s for its pictures."


def test_the_first_steps_and_quick_ones_are_not_judged(clock, capsys):
    run(clock, [9.0, *[0.001] * 40], [0.001] * 20 + [0.5] + [0.001] * 20)
    assert capsys.readouterr().err == ""

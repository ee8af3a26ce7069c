"""Processes that watch one another: three of them, without JAX, of which one is killed or all end in good order."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deperceiver_jax.program import process_watch

PROGRAM = """
import importlib.util, os, sys, time
from pathlib import Path

module, directory, index = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
spec = importlib.util.spec_from_file_location("process_watch", module)
process_watch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process_watch)

def share_address(text):
    if index == 0:
        (directory / "partial").write_text(text)
        os.replace(directory / "partial", directory / "address")
    while not (directory / "address").exists():
        time.sleep(0.01)
    return (directory / "address").read_text()

def gone(who):
    print(who, flush=True)
    os._exit(1)

process_watch.watch(index, 3, share_address, gone, "localhost")
(directory / f"watching.{index}").touch()
while not (directory / f"end.{index}").exists():
    time.sleep(0.01)
"""


@pytest.fixture
def strangers():
    """Connections of others to the first process, before those of its own."""
    return []


@pytest.fixture
def three(tmp_path, strangers):
    """Three processes, once each watches the first."""
    command = [sys.executable, "-c", PROGRAM, process_watch.__file__, str(tmp_path)]
    started = [subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True)]
    deadline = time.monotonic() + 60
    for stranger in strangers:
        while not (tmp_path / "address").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = int((tmp_path / "address").read_text().partition(" ")[0].rpartition(":")[2])
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(stranger)
    started += [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in (1, 2)]
    while not all((tmp_path / f"watching.{i}").exists() for i in range(3)):
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.01)
    time.sleep(0.2)  # the first one accepts
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_process_ends_the_others(three, killed):
    three[killed].send_signal(signal.SIGKILL)
    others = [process for index, process in enumerate(three) if index != killed]
    said = [process.communicate(timeout=30)[0].strip() for process in others]
    assert [process.returncode for process in others] == [1, 1]
    assert said[0] == f"process {killed}" and said[1] == "process 0"  # which the one before has ended, if it was 2


@pytest.mark.parametrize("strangers", [[b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 1000]])
def test_strangers_are_sent_away(three, strangers):
    assert all(process.poll() is None for process in three)
    test_a_killed_process_ends_the_others(three, 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_that_end_in_good_order_do_not_end_the_others(three, tmp_path, order):
    for index in order:
        assert all(three[other].poll() is None for other in order[order.index(index) :])
        Path(tmp_path / f"end.{index}").touch()
        assert three[index].communicate(timeout=30)[0] == "" and three[index].returncode == 0
        time.sleep(0.2)

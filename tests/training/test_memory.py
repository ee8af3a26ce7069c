"""Peak memory, of the process where devices tell none, else of the fullest device; and freed memory, given back."""

import platform
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deperceiver_jax.training.memory import GIB, STATUS, peak_memory, return_freed_memory


def test_of_the_process():
    """What was written once counts, also when it is gone; to some MiB, as the kernel counts pages."""
    np.ones(2**25)  # a quarter of a GiB
    assert peak_memory()["host_memory_gib"] > 0.3


def test_of_the_fullest_device(monkeypatch):
    stats = ({"peak_bytes_in_use": 3 * GIB}, {"peak_bytes_in_use": 5 * GIB}, None)
    devices = [SimpleNamespace(memory_stats=lambda told=told: told) for told in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == {"device_memory_gib": 5.0}


def resident() -> int:
    """MiB."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", STATUS.read_text())[1]) // 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed until it is asked")
def test_freed_memory_is_given_back():
    """What lies below something that is still used stays with the process until then."""
    pieces = [np.ones(2**13) for _ in range(4096)]  # 64 kB each
    last = pieces[-1]
    del pieces
    before = resident()
    return_freed_memory()
    assert resident() < before - 200
    assert last.sum() == 2**13

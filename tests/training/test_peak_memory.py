"""Peak memory: of the process where devices tell none, else of the fullest device."""

from types import SimpleNamespace

import jax
import numpy as np

from deperceiver_jax.training.peak_memory import GIB, peak_memory


def test_of_the_process():
    """An array that is written makes the peak rise by its size, and it stays when the array is gone."""
    before = peak_memory()["host_memory_gib"]
    array = np.ones(2**25)  # a quarter of a GiB
    after = peak_memory()["host_memory_gib"]
    assert 0.05 < before and after >= before
    del array
    assert peak_memory()["host_memory_gib"] >= after


def test_of_the_fullest_device(monkeypatch):
    stats = ({"peak_bytes_in_use": 3 * GIB}, {"peak_bytes_in_use": 5 * GIB}, None)
    devices = [SimpleNamespace(memory_stats=lambda told=told: told) for told in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == {"device_memory_gib": 5.0}

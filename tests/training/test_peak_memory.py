"""Peak memory: of the process where devices tell none, else of the fullest device."""

from types import SimpleNamespace

import jax
import numpy as np

from deperceiver_jax.training.peak_memory import GIB, peak_memory


def test_of_the_process():
    """What was written once counts, also when it is gone; to some MiB, as the kernel counts pages."""
    np.ones(2**25)  # a quarter of a GiB
    assert peak_memory()["host_memory_gib"] > 0.3


def test_of_the_fullest_device(monkeypatch):
    stats = ({"peak_bytes_in_use": 3 * GIB}, {"peak_bytes_in_use": 5 * GIB}, None)
    devices = [SimpleNamespace(memory_stats=lambda told=told: told) for told in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == {"device_memory_gib": 5.0}

"""This process's memory: the most that it has had at one time, for a run's log, and giving back what it has freed."""

import ctypes
import re
import resource
import sys
from pathlib import Path

import jax

GIB = 2**30
STATUS = Path("/proc/self/status")


def peak_memory() -> dict[str, float]:
    """{"device_memory_gib": of this process's fullest device} where devices tell it, as GPUs and TPUs do; else
    {"host_memory_gib": of the process}, which on a CPU holds all that the devices hold."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    if peaks:
        return {"device_memory_gib": round(max(peaks) / GIB, 3)}
    return {"host_memory_gib": round(peak_resident_bytes() / GIB, 3)}


def peak_resident_bytes() -> int:
    """Linux tells it of the program itself; what getrusage tells there may be of the one that started it."""
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Gives the system what is freed, but kept by the C library for later; where that is not glibc, it does nothing.

    After XLA has compiled DETR's step for a CPU that is 0.8 GiB, beside which the step's own memory would come.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""Memory in huge pages, for programs that compute on a CPU under Linux.

A training step on a CPU takes its temporaries from the C library and gives them back, hundreds of MiB a step, and the
system hands out every 4 KiB of them with a fault of its own, filled with zeros: a tenth to a fifth of the demo's time,
a tenth of DETR's at 800 x 1066. In pages of 2 MiB hardly any of that is left. Where Linux gives such pages to programs
that ask for them (transparent_hugepage is `madvise`, as distributions have it), glibc asks from version 2.35 on if its
tunable says so when a program starts.
"""

import glob
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
FIRST_GLIBC = (2, 35)
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")  # of NVIDIA, Google and AMD


def use_huge_pages() -> None:
    """Starts this program again, in the same process and with the same arguments, if it'd have huge pages then.

    To be called before anything else: what the program has done until now is done twice. `GLIBC_TUNABLES` that name the
    tunable, whatever its value, leave the program as it is.
    """
    if (environment := with_huge_pages(os.environ)) and sys.executable:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start again with; None where that would change nothing, or arrays are on an accelerator."""
    tunables = environment.get(TUNABLES, "")
    if TUNABLE in tunables or not (_on_a_cpu(environment) and _may_be_asked_for()):
        return None
    return {**environment, TUNABLES: ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))}


def _on_a_cpu(environment: Mapping[str, str]) -> bool:
    if platforms := environment.get("JAX_PLATFORMS", ""):
        return platforms.split(",")[0] == "cpu"
    return not any(map(glob.glob, ACCELERATORS))


def _may_be_asked_for() -> bool:
    library, version = platform.libc_ver()
    if sys.platform != "linux" or library != "glibc" or tuple(map(int, version.split(".")[:2])) < FIRST_GLIBC:
        return False
    return TRANSPARENT.exists() and "[madvise]" in TRANSPARENT.read_text()

"""XLA's options for programs that run a few times. No JAX here: it is read before JAX starts.

Without fusion emitters and LLVM's optimisations XLA compiles for CPUs in about a third of the time. XLA ends a process
whose XLA_FLAGS it does not know, and later versions know fewer; so each is asked of the installed one first.
"""

import os
import re
import subprocess
import sys

QUICK = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
KNOWN = "DEPERCEIVER_JAX_TESTS_XLA_FLAGS"  # the answer, for the processes that this one starts


def quick_flags(devices: int) -> str:
    """XLA_FLAGS for so many simulated devices."""
    if KNOWN not in os.environ:
        os.environ[KNOWN] = " ".join(known_flags(QUICK))
    return f"--xla_force_host_platform_device_count={devices} {os.environ[KNOWN]}"


def known_flags(flags: tuple[str, ...]) -> list[str]:
    """Those of `flags` that the installed XLA knows, in their order."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not asked.returncode:
        return list(flags)
    refused = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", asked.stderr)
    if refused is None:
        raise RuntimeError(f"JAX does not start: {asked.stderr[-1000:]}")
    return [flag for flag in flags if flag not in refused[1].split()]

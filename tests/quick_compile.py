"""XLA's options for programs that run a few times. No JAX here: it is read before JAX starts.

Without fusion emitters and LLVM's optimisations XLA compiles for CPUs in about a third of the time.
"""

QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def quick_flags(devices: int) -> str:
    """XLA_FLAGS for so many simulated devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"

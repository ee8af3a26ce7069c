"""Eight simulated devices, no silent rank promotion: set before JAX starts."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# XLA runs all simulated devices on one pool of as many threads as there are cores, and stops for ever when a queue of
# steps takes them all while a collective waits for its last participant. More threads than that queue needs:
os.environ.setdefault("NPROC", "32")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and the command-line programs live beside the package

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

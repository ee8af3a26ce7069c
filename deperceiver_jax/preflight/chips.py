"""What the makers publish about each chip, and the topologies of them that libtpu can compile for."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from deperceiver_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """Figures of one chip; a row of the table names its source."""

    hbm_gib: int
    peak_flops: float  # bfloat16, a second
    bandwidth: float  # of its memory, bytes a second
    links: float  # bytes a second that it can send to other chips of its slice, over all links together
    network: float  # to other slices, over its share of its hosts' network; 0 where no figure is published
    accelerator: str  # what the cloud calls a slice of them; a number of cores or chips follows
    cores: int  # that this number counts for each chip
    slice_chips: int  # of the largest slice
    host_chips: int
    host_cpus: int  # virtual ones; 0 where no figure was found
    source: str


# Read on 2026-11-21. v6e: earlier versions of its page said 1640 GB/s and 3584 Gbit/s of links. The page of v4 has no
# figure for its links; Google's announcement of v5p says 2400 Gbit/s. The network of a pod of 256 chips has 6.4 Tbit/s
# for v5e and 25.6 for v6e, that of a chip of v5p 50 Gbit/s; no figure was found for v4's. Hosts are those of slices.
CHIPS = {
    "v4": Chip(32, 275e12, 1200e9, 300e9, 0, "v4", 2, 4096, 4, 0, "cloud.google.com/tpu/docs/v4"),
    "v5e": Chip(16, 197e12, 819e9, 200e9, 3.125e9, "v5litepod", 1, 256, 4, 112, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 6.25e9, "v5p", 2, 6144, 4, 208, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(32, 918e12, 1600e9, 400e9, 12.5e9, "v6e", 1, 256, 4, 0, "cloud.google.com/tpu/docs/v6e"),
}


def open_topology(name: str) -> tuple[Chip | None, Sequence[jax.Device]]:
    """(the chip, the devices) of a topology such as v5e:4x4, of several slices as in 2xv5e:4x4, or of this machine for
    `local`, whose chip is None.

    Call it before JAX is used: for a TPU that is not there, JAX runs on the CPU. Raises UserError for a chip or a shape
    that does not exist, and without libtpu.
    """
    if name == "local":
        return None, jax.devices()
    found = re.fullmatch(rf"(?:([1-9]\d*)x)?((?:{'|'.join(CHIPS)}):([1-9]\d*(?:x[1-9]\d*)*))", name)
    if found is None:
        raise UserError(
            f"--topology is {name!r}; it can be local, or a chip ({', '.join(CHIPS)}) and a shape, as in v5e:4x4, of "
            "several slices 2xv5e:4x4."
        )
    slices, slice_name, sizes = int(found[1] or 1), found[2], found[3].split("x")
    kind = slice_name.partition(":")[0]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for a TPU needs its compiler, which is not installed: pip install '.[preflight]'.")
    chip = CHIPS[kind]
    chips = math.prod(map(int, sizes))
    # libtpu asks the machine it runs on what it is, and locks it, unless told.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.accelerator}-{chips * chip.cores}"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **several).devices
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology: libtpu knows no {slice_name}: {why}.") from None

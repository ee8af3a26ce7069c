"""The processes of one run: how they find one another, and how one leaves that cannot go on.

Each process has the devices of one machine, or one of them, and they all run the same command. Where a cluster's
environment says how many there are (a TPU slice, Slurm, Open MPI) nothing need be said; elsewhere flags say it
(flags.py), or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in their place.
"""

import contextlib
import glob
import os
import re
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from deperceiver_jax.errors import UserError
from deperceiver_jax.program.process_watch import part, watch

START_TIMEOUT = 300  # seconds that the first process waits for the last one
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What collectives on CPUs (gloo) and GPUs (NCCL) and JAX's coordinator say when another process is gone.
LOST = re.compile("gloo|nccl|peer|heartbeat|coordination service|socket closed|connection reset", re.IGNORECASE)
# Where clusters say how many processes a run has; a TPU slice lists its hosts instead.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_leaving = threading.Lock()
HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def join(values: flags.FlagValues, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes when flags or the environment say that there are any. Call it before JAX has devices.

    Raises UserError for settings that contradict one another. Ends the process, with a sentence, when not all of them
    come within START_TIMEOUT.
    """
    given = by_hand(values, environment)
    if values.distributed is False:
        if given:
            raise UserError("--nodistributed contradicts the flags or variables that name the other processes.")
        return
    if not (given or values.distributed or several_announced(environment)):
        return
    where = (
        f"{given['num_processes']} processes at {given['coordinator_address']}" if given else "the cluster's processes"
    )
    late = threading.Timer(START_TIMEOUT, _give_up, [f"not all of {where} came within {START_TIMEOUT} s."])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **given,
            local_device_ids=None if given else own_devices(environment),
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=2 * START_TIMEOUT,  # JAX would end the process with a stack trace
        )
    except (ValueError, TypeError, RuntimeError) as error:
        hint = "" if given else " Name them by hand: --coordinator_address, --process_count and --process_id."
        raise UserError(f"The processes cannot be joined: {str(error).rstrip('.')}.{hint}") from None
    finally:
        late.cancel()
    watch_others(given)


def watch_others(given: dict[str, Any]) -> None:
    """From here on this process ends with a sentence when another one is gone. `given` are the flags by hand."""
    if jax.process_count() == 1:
        return
    host = given["coordinator_address"].rpartition(":")[0] if given else socket.gethostname()
    try:
        watch(jax.process_index(), jax.process_count(), _from_first, _lost, host)
    except OSError as error:
        late = "when a process ends, this one may notice late, or end with a stack trace of JAX"
        print(f"warning: process 0 cannot be watched ({error}): {late}.", file=sys.stderr, flush=True)


def _from_first(text: str) -> str:
    """What process 0 passes, in every process."""
    sent = np.zeros(300, np.uint8)
    sent[: len(text.encode())] = list(text.encode())
    return bytes(multihost_utils.broadcast_one_to_all(sent).astype(np.uint8)).rstrip(b"\0").decode()


def _lost(why: str) -> None:
    _give_up(
        f"Another process of this run ended or cannot be reached ({why}). Start the same command again on all "
        "machines: a run continues from its last checkpoint."
    )


def by_hand(values: flags.FlagValues, environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize that flags or variables give; empty when they give none."""
    flag_names = ("coordinator_address", "process_count", "process_id")
    given = {}
    for flag, variable in zip(flag_names, VARIABLES, strict=True):
        value = getattr(values, flag)
        if value is None and environment.get(variable):
            value = environment[variable]
        if value is not None:
            given[flag] = value
    if not given:
        return {}
    if missing := [f"--{flag}" for flag in flag_names if flag not in given]:
        raise UserError(f"To join by hand, {' and '.join(missing)} must be given too.")
    address, count, index = given["coordinator_address"], *(_number(given, flag) for flag in flag_names[1:])
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address is {address}; it must be HOST:PORT, as in 10.0.0.1:1234.")
    if not 0 <= index < count:
        raise UserError(f"--process_id is {index}, which is not one of 0 to {count - 1} (--process_count is {count}).")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(given, flag):
    try:
        return int(given[flag])
    except ValueError:
        raise UserError(f"--{flag} is {given[flag]}, which is not a number.") from None


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Of NVIDIA's GPUs those that Slurm shows this process alone (--gpus-per-task); None where JAX knows.

    JAX would take the process's number on the machine for that of its GPU.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name not in ("", "-1")]
    alone = len(visible) == 1 or "SLURM_GPUS_PER_TASK" in environment
    if "SLURM_LOCALID" not in environment or "JAX_LOCAL_DEVICE_IDS" in environment or not (visible and alone):
        return None
    return list(range(len(visible)))


def several_announced(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that a cluster has started."""
    if any(environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1 for name in COUNTS):
        return True
    if any("," in environment.get(name, "") for name in HOST_LISTS):
        return True
    if any(name in environment for name in (*HOST_LISTS, "TPU_SKIP_MDS_QUERY")):
        return False
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and "," in _tpu_hosts(environment)


def _tpu_hosts(environment) -> str:
    """The hosts of this machine's TPU slice, as Compute Engine knows them; "" anywhere else."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=3) as f:
            return f.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


def leave(error: BaseException) -> None:
    """Ends this process at once, with status 1 and a sentence, if it is one of several that `error` ended.

    An ordinary end would wait minutes for the others, which in turn wait for this one in the middle of a step. Left
    like this they notice within a moment. Returns where there are no others.
    """
    if not jax.distributed.is_initialized():
        return
    if isinstance(error, UserError):
        _give_up(str(error))
    if LOST.search(str(error)):
        _lost(str(error).splitlines()[0][:200].rstrip("."))
    with contextlib.suppress(OSError):  # nobody may read stderr any more
        traceback.print_exception(error)
    _give_up("This process of the run ends here, and so do the others.")


def _give_up(sentence: str) -> None:
    if not _leaving.acquire(blocking=False):  # a thread says why already
        time.sleep(60)
    with contextlib.suppress(OSError):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if part():
        time.sleep(1)  # or else JAX would end them with a stack trace, where this one has the coordinator
    os._exit(1)

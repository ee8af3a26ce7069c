"""The train step of one bucket, compiled for any devices: what it needs and what it does."""

import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.preflight.arithmetic import count_flops
from deperceiver_jax.preflight.hlo_traffic import program_traffic
from deperceiver_jax.preflight.parts import Part, memory_by_part
from deperceiver_jax.sharding import batch_sharding, count_slices, make_mesh
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.compile_ahead import abstract_batch, order_for

_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Cost(NamedTuple):
    """One step on one chip. Bytes, floating point operations, seconds."""

    arguments: int  # the state and the batch
    temporaries: int  # and the program itself
    outputs: int  # beyond those that take the place of arguments
    fits_chip: bool  # False: the compiler gave up, and `temporaries` is what it said it would have needed in all
    flops: float  # of matrix products and convolutions
    memory_bytes: int
    interconnect_bytes: int  # to chips of its slice
    network_bytes: int  # to other slices
    seconds: float  # to compile
    program: str = ""  # the compiled text

    @property
    def parts(self) -> list[Part]:
        """What `memory_bytes` consists of, the largest first; reads the whole program."""
        return memory_by_part(self.program)

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def compile_step(config: ConfigDict, devices: Sequence[jax.Device], bucket: tuple[int, int], num_boxes: int) -> Cost:
    """Compiles the step that train.py would run, for images padded to `bucket` with `num_boxes` box slots."""
    start = time.monotonic()
    traced = trace_step(config, devices, bucket, num_boxes)
    flops = count_flops(traced.jaxpr, devices[0].platform) / len(devices)
    try:
        compiled = traced.lower().compile(**order_for(bucket, devices[0].platform))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise UserError(f"The compiler gives up at {bucket[0]}x{bucket[1]}: {reason(str(error))}") from error
        return Cost(0, needed, 0, False, flops, 0, 0, 0, time.monotonic() - start)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    traffic = program_traffic(text, count_slices(devices))
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        fits_chip=True,
        flops=flops,
        memory_bytes=traffic.memory,
        interconnect_bytes=traffic.interconnect,
        network_bytes=traffic.network,
        seconds=time.monotonic() - start,
        program=text,
    )


def reason(message: str) -> str:
    """The first sentence of a refusal, without codes and listings."""
    lines = [line for line in message.splitlines() if line and not re.search(r"E\d{4}: \w+:$", line)]
    return lines[0][:200].split(" = ")[0].rstrip(".") + "."


def needed_bytes(message: str) -> int | None:
    """The memory that a program would have needed, in libtpu's refusal to compile it; None in other messages."""
    found = _NEEDED.search(message)
    if found is None:
        return None
    number, unit = found.groups()[:2] if found[1] else found.groups()[2:]
    return int(float(number) * _UNITS[unit])


def trace_step(config: ConfigDict, devices: Sequence[jax.Device], bucket: tuple[int, int], num_boxes: int):
    """The train step as `jax.jit(...).trace` gives it, for abstract arrays."""
    mesh = make_mesh(config.mesh.model, devices)
    # The schedule's length changes a constant of the program.
    training = build_training(config, mesh, steps_per_epoch=1000, num_steps=1000 * config.train.num_epochs)
    batch = abstract_batch(config.data.batch_size, bucket, num_boxes, batch_sharding(mesh))
    return training.step.trace(training.plan.abstract, batch)

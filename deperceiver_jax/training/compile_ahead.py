"""The train step of every size of image, compiled before the first step, several sizes at the same time.

Python traces one size after the other; XLA compiles without Python's lock, in threads, while the next one is traced.
All processes of a run take the sizes in the same order, so that compilers which ask one another for results (XLA's
autotuning on several GPUs) find each other: the first size that is not done anywhere is under way everywhere.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from deperceiver_jax.errors import UserError
from deperceiver_jax.sharding import batch_sharding
from deperceiver_jax.structures import Batch
from deperceiver_jax.training.memory import return_freed_memory
from deperceiver_jax.training.train_state import TrainState

PATIENCE = 3600  # seconds that one process waits for another to compile
LARGE = 512 * 512  # pixels of an image from which on a CPU's program is ordered for memory

Step = Callable[[TrainState, Batch], tuple[TrainState, dict]]


def compile_sizes(
    train_step: jax.stages.Wrapped, state: TrainState, batches, batch_size: int, mesh: Mesh, *, threads: int = 0
) -> Step:
    """`train_step`, compiled for every size in `batches` (the TrainBatches); it takes batches of no other size.

    state: abstract (Plan.abstract) or real. batch_size: global. threads: sizes that are compiled at the same time, 0
    for one on each processor. What can be kept goes into the compilation cache; a program that calls back to the host,
    as the `scipy` matcher's does, is kept from jax 0.11 on.

    Raises UserError when a step does not fit into a device's memory; any other error says for which size it came.
    """
    start, programs = time.monotonic(), {}
    threads = min(threads or os.cpu_count() or 1, len(batches.buckets))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    sizes = f"{len(batches.buckets)} size{'s' if len(batches.buckets) > 1 else ''}"
    if jax.process_index() == 0:
        print(f"compiling the step for {sizes}", flush=True)
    try:
        running = {}
        for size in batches.buckets:
            lowered = train_step.lower(state, abstract_batch(batch_size, size, batches.box_slots, batch_sharding(mesh)))
            running[pool.submit(lowered.compile, **order_for(size, mesh.devices.flat[0].platform))] = size
            _raise_errors(running)  # before tracing in vain
        for done in as_completed(running):
            _raise_errors({done: running[done]})
            programs[running[done]] = done.result()
            if jax.process_index() == 0:
                seconds, name = time.monotonic() - start, _name(running[done])
                print(f"compiled the step for {len(programs)}/{sizes} ({name}), {seconds:.0f} s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return_freed_memory()  # the compiler's
    if jax.process_count() > 1:  # a faster one would give up: the first collective of CPUs waits for 30 s alone
        everybody = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes("the step is compiled", timeout=PATIENCE, processes=everybody)
    return lambda state, batch: programs[batch.image.shape[1:3]](state, batch)


def order_for(size: Sequence[int], platform: str) -> dict[str, Any]:
    """How to compile the step for images of `size` (height, width): what to give jax.stages.Lowered.compile.

    By itself XLA orders a CPU's program so that operations can run at once, which small images gain from. Then what is
    needed late is made early: at 800 x 1066 DETR's step has 1.68 GiB of temporaries so, and 1.19 ordered for memory,
    and takes as long, since every operation has work for all cores.
    """
    if platform != "cpu" or size[0] * size[1] < LARGE:
        return {}
    return {"compiler_options": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def abstract_batch(size: int, bucket: tuple[int, int], num_boxes: int, sharding) -> Batch:
    """A Batch without contents, for `bucket` (height, width)."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)

    return Batch(
        image=array(np.uint8, *map(int, bucket), 3),
        size=array(np.int32, 2),
        original_size=array(np.int32, 2),
        example=array(np.int32),
        boxes=array(np.float32, num_boxes, 4),
        labels=array(np.int32, num_boxes),
        box_valid=array(bool, num_boxes),
    )


def _raise_errors(running) -> None:
    for future, size in running.items():
        error = future.exception() if future.done() else None
        if error is None:
            continue
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            why = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0][:300].rstrip(".")
            raise UserError(
                f"The training step for images of {_name(size)} does not fit into memory ({why}): a smaller "
                "config.data.batch_size, config.optimizer.accumulate_steps or config.rematerialize=True needs less."
            ) from error
        error.add_note(f"While the training step was compiled for images of {_name(size)}.")
        raise error


def _name(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"

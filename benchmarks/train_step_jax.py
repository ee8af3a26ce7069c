"""Times our training step for train_step.py, which says what is measured; prints one line of JSON.

    python benchmarks/train_step_jax.py --machine
    python benchmarks/train_step_jax.py --batches=FILE --config=configs/detr.py:r50 --config.precision=bfloat16

What is timed is what trains: the detector, `set_loss` and the step of `build_training`, on one device.
"""

import copy
import json
import math
import os
import statistics
import sys
import time
import timeit
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic_batches import CLASS_SLOTS, read_batches, useful_share  # noqa: E402
from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.models import field_needs  # noqa: E402
from deperceiver_jax.preflight.arithmetic import count_flops  # noqa: E402
from deperceiver_jax.preflight.program import trace_step  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402
from deperceiver_jax.sharding import make_mesh, shard_batch  # noqa: E402
from deperceiver_jax.structures import Assignment, Batch  # noqa: E402
from deperceiver_jax.training.build import Training, build_training  # noqa: E402
from deperceiver_jax.training.compile_ahead import order_for  # noqa: E402
from deperceiver_jax.training.memory import GIB, peak_memory, return_freed_memory  # noqa: E402
from deperceiver_jax.training.train_state import TrainState, count_parameters  # noqa: E402
from deperceiver_jax.training.train_step import non_finite_term  # noqa: E402

LENGTH = dict(steps_per_epoch=1000, num_steps=1000)  # of a schedule, whatever it is


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("machine", False, "Measure the device's matrix products instead.", flag_values=values)
    flags.DEFINE_string("batches", None, "A file of synthetic_batches.py.", flag_values=values)
    flags.DEFINE_integer("steps", 20, "Steps of a round.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Rounds.", flag_values=values)
    flags.DEFINE_bool("matching", True, "Time the step without matching too.", flag_values=values)


def main(argv: list[str]) -> None:
    values, rest = parse_flags(argv, define_flags, __doc__)
    if values.machine:
        print(json.dumps(machine()))
        return
    batches = read_batches(Path(values.batches))
    config = parse_config(rest, needs=field_needs)
    config.data.batch_size, config.model.num_classes = len(batches[0].image), CLASS_SLOTS
    print(json.dumps(measure(config, batches, values.steps, values.rounds, with_matching=values.matching)))


def machine() -> dict:
    """The device, and the FLOP/s of a large matrix product in each precision, as a program gets it by default."""
    device = jax.devices()[0]
    size, calls = (1024, 4) if device.platform == "cpu" else (8192, 20)
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "versions": f"Python {sys.version.split()[0]}, jax {jax.__version__}, NumPy {np.__version__}",
        "cores": os.cpu_count(),
        "peak_flops": {precision: peak_flops(precision, size, calls) for precision in ("bfloat16", "float32")},
    }


def peak_flops(precision: str, size: int, calls: int) -> float:
    left, right = (jax.random.normal(key, (size, size), precision) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)

    def run():
        jax.block_until_ready([product(left, right) for _ in range(calls)])

    run()  # compiles
    return 2 * size**3 * calls / min(timeit.repeat(run, number=1, repeat=5))


def measure(config: ConfigDict, batches: list[Batch], steps: int, rounds: int, *, with_matching: bool) -> dict:
    """Times in seconds a step, sizes in bytes, operations a step; for the mean of the batches."""
    mesh = make_mesh(devices=jax.devices()[:1])
    on_device = [shard_batch(batch, mesh) for batch in batches]
    training = build_training(config, mesh, **LENGTH)
    state = training.plan.initialize()  # before compiling, as in a run, which then gives back what both have freed
    start = time.perf_counter()
    compiled = compile_step(training, on_device)
    compile_seconds = time.perf_counter() - start
    state, loss = warm_up(compiled, state, on_device)
    state, _ = time_rounds([compiled], state, on_device, steps, 1)  # two steps under way, and no other program's memory
    (held,) = peak_memory().values()
    steps_to_time = [compiled]
    if with_matching:
        with mock.patch("deperceiver_jax.losses.set_loss.match", fixed_assignment):
            steps_to_time.append(compile_step(build_training(config, mesh, **LENGTH), on_device))
        state, _ = warm_up(steps_to_time[1], state, on_device)
    _, (times, *unmatched) = time_rounds(steps_to_time, state, on_device, steps, rounds)
    flops = model_flops(config, batches)
    result = {
        "implementation": "this package",
        "seconds": statistics.median(times),
        "fastest": min(times),
        "loss": loss,
        "trained_parameters": count_parameters(training.plan.abstract)[0],
        "compile_seconds": compile_seconds,
        "useful_share": useful_share(batches),
        "model_flops": statistics.mean(flops),
        "useful_flops": statistics.mean(f * useful_share([b]) for f, b in zip(flops, batches, strict=True)),
        "xla_flops": statistics.mean(compiled[batch.image.shape].cost_analysis()["flops"] for batch in batches),
        "peak_bytes": held * GIB,
    }
    if unmatched:
        result |= {"unmatched_seconds": statistics.median(unmatched[0])}
    return result


def compile_step(training: Training, batches: list[Batch]) -> dict[tuple[int, ...], jax.stages.Compiled]:
    """The step for every shape of image, by that shape."""
    shapes = {batch.image.shape: batch for batch in batches}
    programs = {}
    for shape, batch in shapes.items():
        lowered = training.step.lower(training.plan.abstract, batch)
        programs[shape] = lowered.compile(**order_for(shape[1:3], jax.devices()[0].platform))
    return_freed_memory()  # as a run does
    return programs


def warm_up(compiled, state: TrainState, batches: list[Batch]) -> tuple[TrainState, float]:
    """(state, the first loss) after every shape has run once. Raises UserError when a loss is not finite."""
    losses = []
    for batch in {batch.image.shape: batch for batch in batches}.values():
        state, metrics = compiled[batch.image.shape](state, batch)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if term := non_finite_term(metrics):
            raise UserError(f"{term} is {metrics[term]} in a step of random images, so its time means nothing.")
        losses.append(metrics["loss"])
    return state, losses[0]


def time_rounds(
    compiled: list[dict], state: TrainState, batches: list[Batch], steps: int, rounds: int
) -> tuple[TrainState, list[list[float]]]:
    """(state, seconds a step of every round for each of the compiled steps).

    They take turns, as a machine's speed may drift. Like train.py, it starts a step before it waits for the last one.
    """
    steps = math.ceil(steps / len(batches)) * len(batches)
    times: list[list[float]] = [[] for _ in compiled]
    for _ in range(rounds):
        for program, seconds in zip(compiled, times, strict=True):
            unread = []
            start = time.perf_counter()
            for step in range(steps):
                batch = batches[step % len(batches)]
                state, metrics = program[batch.image.shape](state, batch)
                unread.append(metrics)
                if len(unread) > 1:
                    jax.block_until_ready(unread.pop(0))
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - start) / steps)
    return state, times


def fixed_assignment(cost, box_valid, *, backend: str, mesh) -> Assignment:
    """In place of `match`: query n for box n, without asking anybody. The costs are still computed."""
    del backend, mesh
    num_layers, _, num_queries, num_slots = cost.shape
    needed = (jnp.min(cost) < -1e30).astype(jnp.int32)  # 0, which the compiler cannot know
    query = jnp.arange(num_slots, dtype=jnp.int32) % num_queries + needed
    shape = (num_layers, *box_valid.shape)
    matched = box_valid & (jnp.arange(num_slots) < num_queries)[None]
    return Assignment(jnp.broadcast_to(query[None, None], shape), jnp.broadcast_to(matched[None], shape))


def model_flops(config: ConfigDict, batches: list[Batch]) -> list[int]:
    """Operations of the step of each batch: nothing is computed twice, and points of deformable attention are read.

    So the attention is the plain one and the platform a CPU, wherever this runs.
    """
    config = copy.deepcopy(config)
    config.attention, config.rematerialize = "xla", False
    counts = {}
    for batch in batches:
        frame = batch.image.shape[1:3]
        if frame not in counts:
            traced = trace_step(config, jax.devices()[:1], frame, batch.box_valid.shape[1])
            counts[frame] = count_flops(traced.jaxpr, "cpu")
    return [counts[batch.image.shape[1:3]] for batch in batches]


if __name__ == "__main__":
    sys.exit(run(main))

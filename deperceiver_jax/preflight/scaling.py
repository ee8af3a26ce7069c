"""How a run grows from 4 to 1024 chips at constant images a chip, from one compiled step.

Compiled: operations, bytes moved and bytes sent of one chip, on one slice. Published: a chip's rates, its hosts, the
largest slice. Measured: what a loader worker, the metric and a checkpoint take, elsewhere. All else is arithmetic, and
its times are the least ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
from ml_collections import ConfigDict

from deperceiver_jax.evaluation.evaluate import make_detect_step
from deperceiver_jax.preflight.arithmetic import count_flops
from deperceiver_jax.preflight.chips import Chip
from deperceiver_jax.preflight.program import Cost
from deperceiver_jax.sharding import batch_sharding, make_mesh
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.compile_ahead import abstract_batch
from deperceiver_jax.training.train_state import inference_arrays

CHIPS = tuple(4 * 2**i for i in range(9))
# Seconds an image, of wall time: COCO's metric and its files on a core that has other work (2.2 / 5000 on a free one).
METRIC = 4.5 / 5000
ENOUGH = 0.8  # of the chips' time in training steps; below it, a run no longer scales


class Work(NamedTuple):
    """What a run does beside its steps, and on how much."""

    train_images: int
    eval_images: int
    images_a_chip: float
    detect_flops: float  # of one image
    state_bytes: int  # that a checkpoint holds
    eval_every: int  # steps, 0 for an epoch, -1 for the end, as config.train has them
    checkpoint_every: int
    epochs: int
    num_workers: int  # of the loader, a host


class Rates(NamedTuple):
    """What was measured."""

    worker: float  # images a second by a worker of the loader
    checkpoint: float  # bytes a second
    compiling: float  # seconds for all padded sizes, on this machine


class Row(NamedTuple):
    """A number of chips. Seconds, images, bytes."""

    chips: int
    hosts: int
    slices: int
    batch: int
    bounds: dict[str, float]  # least seconds of a step, by what takes them
    epoch: float  # steps alone
    evaluation: float
    checkpoint: float
    host_rate: float  # images a second that a host's loader must make
    in_steps: float  # share of the time

    @property
    def step(self) -> float:
        return max(self.bounds.values())

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)


def measure_work(
    config: ConfigDict, devices: Sequence[jax.Device], bucket: tuple[int, int], num_boxes: int, images: tuple[int, int]
) -> Work:
    """Traces the step of an evaluation; compiles nothing. images: of (training, evaluation)."""
    mesh = make_mesh(config.mesh.model, devices)
    plan = build_training(config, mesh, steps_per_epoch=1000, num_steps=1000 * config.train.num_epochs).plan
    batch = abstract_batch(config.data.batch_size, bucket, num_boxes, batch_sharding(mesh))
    detect_step = cast(Any, make_detect_step(plan.skeleton.merge, config, mesh))  # a jitted function
    step = detect_step.trace(inference_arrays(plan.abstract), batch)
    return Work(
        *images,
        images_a_chip=config.data.batch_size / len(devices),
        detect_flops=count_flops(step.jaxpr, devices[0].platform) / config.data.batch_size,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.abstract)),
        eval_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        epochs=config.train.num_epochs,
        num_workers=config.data.num_workers,
    )


def scale(cost: Cost, compiled_for: int, chip: Chip, work: Work, rates: Rates) -> list[Row]:
    """A row for each of `CHIPS` whose batch an epoch can fill. cost: of a step on `compiled_for` chips of one slice."""
    rows = []
    for chips in CHIPS:
        batch = round(chips * work.images_a_chip)
        if steps := work.train_images // batch:
            rows.append(_row(cost, compiled_for, chip, work, rates, chips, batch, steps))
    return rows


def _row(cost, compiled_for, chip, work, rates, chips, batch, steps):
    slices = -(-chips // chip.slice_chips)
    hosts = -(-chips // chip.host_chips)
    bounds = {
        "FLOP/s": cost.flops / chip.peak_flops,
        "memory": cost.memory_bytes / chip.bandwidth,
        **_sending(cost.interconnect_bytes, compiled_for, chip, chips, slices),
    }
    step = max(bounds.values())
    # A step of an evaluation is to one of training as their operations are.
    rounds = -(-work.eval_images // batch)
    forward = step * work.detect_flops * work.images_a_chip / cost.flops
    loaded = work.eval_images / hosts / (rates.worker * max(work.num_workers, 1))
    evaluation = max(rounds * forward, loaded) + METRIC * work.eval_images
    checkpoint = work.state_bytes / rates.checkpoint
    every = [
        {0: steps, -1: steps * work.epochs}.get(field, field) for field in (work.eval_every, work.checkpoint_every)
    ]
    # A checkpoint is written while the run goes on, and only the next one waits for it.
    taken = max(step + evaluation / every[0], checkpoint / every[1])
    host_rate = min(chips, chip.host_chips) * work.images_a_chip / step
    return Row(chips, hosts, slices, batch, bounds, steps * step, evaluation, checkpoint, host_rate, step / taken)


def _sending(compiled_bytes, compiled_for, chip, chips, slices):
    """Of the sums of gradients: round a ring within a slice, and of a chip's part of them round a ring of slices."""
    summed = compiled_bytes * compiled_for / (2 * (compiled_for - 1))  # bytes
    inside = min(chips, chip.slice_chips)
    links = {"links": 2 * summed * (inside - 1) / inside / chip.links}
    if slices == 1 or not chip.network:
        return links
    return links | {"network": 2 * summed / inside * (slices - 1) / slices / chip.network}


_COLUMNS = {
    "chips": 6,
    "hosts": 6,
    "slices": 7,
    "batch": 6,
    "FLOP/s": 8,
    "memory": 8,
    "links": 7,
    "network": 8,
    "bound by": 9,
    "images/s": 9,
    "a host": 7,
    "workers": 8,
    "epoch": 8,
    "evaluation": 11,
    "checkpoint": 11,
    "in steps": 9,
}


def describe(rows: Sequence[Row], chip: Chip, work: Work, rates: Rates, compiled: str) -> str:
    """The table, what of it is compiled, published and measured, and where a run stops scaling. compiled: for what."""
    text = [
        f"\nFrom 4 to 1024 chips with {work.images_a_chip:g} images a chip: {work.train_images} images an epoch, "
        f"{work.eval_images} to evaluate.",
        f"Compiled for {compiled}: operations, bytes moved, bytes sent. Published ({chip.source}): a chip's rates, "
        f"{chip.host_chips} chips and {chip.host_cpus or 'so many'} CPUs a host, {chip.slice_chips} chips a slice.",
        f"Measured elsewhere: {rates.worker:g} images/s by a loader worker, {rates.checkpoint / 1e6:g} MB/s of a "
        f"checkpoint ({work.state_bytes / 1e9:.2f} GB), {METRIC * 1e3:.1f} ms of the metric an image.",
        "The rest is arithmetic: least times, of a step in ms, of an epoch's steps, an evaluation and a checkpoint in "
        "s. In steps: the share of the time.",
        "".join(f"{name:>{width}}" for name, width in _COLUMNS.items()),
    ]
    for row in rows:
        cells = [str(row.chips), str(row.hosts), str(row.slices), str(row.batch)]
        cells += [f"{1e3 * row.bounds[name]:.2f}" if name in row.bounds else "-" for name in list(_COLUMNS)[4:8]]
        cells += [row.bound_by, f"{row.batch / row.step:.0f}", f"{row.host_rate:.0f}"]
        cells += [str(_workers(row, rates)), f"{row.epoch:.1f}", f"{row.evaluation:.1f}", f"{row.checkpoint:.1f}"]
        cells += [f"{100 * row.in_steps:.0f} %"]
        text.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True)))
    return "\n".join([*text, *(f"- {sentence}" for sentence in limits(rows, chip, work, rates))])


def limits(rows: Sequence[Row], chip: Chip, work: Work, rates: Rates) -> list[str]:
    """Where a run stops scaling, and what then helps, a sentence each."""
    said = []
    if sending := next((row for row in rows if row.bound_by in ("links", "network")), None):
        said.append(
            f"From {sending.chips} chips on, {sending.bound_by} bound a step: more images a chip, with which sums of "
            "gradients do not grow."
        )
    else:
        shares = {name: max(row.bounds.get(name, 0) / row.step for row in rows) for name in ("links", "network")}
        said.append(
            f"Sending never bounds a step: links take {100 * shares['links']:.0f} % of it at most, the network between "
            f"slices {100 * shares['network']:.0f} %."
            if chip.network or rows[-1].slices == 1
            else f"Links never bound a step; no rate is published of the network between {rows[-1].slices} slices."
        )
    hungry = max(rows, key=lambda row: row.host_rate)
    workers = _workers(hungry, rates)
    if 0 < chip.host_cpus < workers:
        said.append(
            f"The loader of a host would need {workers} workers, and it has {chip.host_cpus} CPUs, at any number of "
            "chips: pictures that are stored smaller need fewer."
        )
    elif workers > work.num_workers:
        said.append(
            f"The loader of a host needs {workers} workers for {hungry.host_rate:.0f} images/s, a CPU each, at any "
            f"number of chips: --config.data.num_workers={workers} instead of {work.num_workers}."
        )
    if late := next((row for row in rows if row.in_steps < ENOUGH), None):
        said.append(
            f"From {late.chips} chips on less than {ENOUGH:.0%} of the time goes into steps, since evaluation and "
            f"checkpoints do not get shorter with more chips: {_rarer(rows[-1])}"
        )
    if short := next((row for row in rows if work.epochs * row.epoch < rates.compiling - 1), None):
        seconds = work.epochs * short.epoch
        said.append(
            f"From {short.chips} chips on the steps of all {work.epochs} epochs take {seconds:.0f} s, less than "
            f"compiling, {rates.compiling:.0f} s on this machine: config.train.compilation_cache keeps it."
        )
    lacking = next((chips for chips in CHIPS if chips > rows[-1].chips), None)
    if lacking:
        said.append(f"{lacking} chips would need more images for one batch than an epoch has.")
    said.append(f"Whether batches of {rows[-1].batch} learn as much an epoch is no arithmetic, and was not tried.")
    return said


def _rarer(row):
    """How seldom to evaluate and to save, so that enough of the time goes into steps."""
    needed = max(row.evaluation * ENOUGH / (1 - ENOUGH), row.checkpoint)
    steps = math.ceil(needed / row.step)
    epochs = max(1, math.ceil(steps * row.step / row.epoch))
    every = epochs * round(row.epoch / row.step)
    return (
        f"with {row.chips}, evaluate and save every {epochs} epochs (--config.train.eval_every={every} "
        f"--config.train.checkpoint_every={every})."
    )


def _workers(row, rates):
    return math.ceil(row.host_rate / rates.worker)

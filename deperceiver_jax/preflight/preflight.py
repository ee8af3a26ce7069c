"""What `deperceiver preflight` does."""

import re
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from deperceiver_jax.data import open_source
from deperceiver_jax.data.batches.plan import training_buckets
from deperceiver_jax.errors import UserError
from deperceiver_jax.models import field_needs
from deperceiver_jax.preflight import scaling
from deperceiver_jax.preflight.chips import GIB, Chip, open_topology
from deperceiver_jax.preflight.nominal import NOMINAL_BOXES, NOMINAL_IMAGES, nominal_sizes
from deperceiver_jax.preflight.program import Cost, compile_step
from deperceiver_jax.preflight.report import HEADER, parts_table, row
from deperceiver_jax.preflight.search import largest_batch
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.sharding import count_slices


def preflight(values: flags.FlagValues, config_arguments: Sequence[str]) -> None:
    """The program. values: its flags; config_arguments: `--config...`. Raises UserError."""
    config = parse_config(config_arguments, needs=field_needs)
    chip, devices = open_topology(values.topology)
    if values.scaling:
        require_scalable(config, values.topology, chip, devices)
    buckets, num_boxes = plan_buckets(config, values.sizes)
    hbm_gib = values.hbm_gib or (chip.hbm_gib if chip else local_memory(devices) / GIB)
    per_chip = config.data.batch_size / len(devices)
    print(
        f"{config.model.name} on {values.topology}: {len(devices)} x {devices[0].device_kind}, batches of "
        f"{config.data.batch_size} ({per_chip:g} a chip), {config.precision}, attention {config.attention}, "
        f"{num_boxes} box slots."
    )
    if chip:
        print(
            f"A chip has {chip.hbm_gib} GiB, {chip.peak_flops / 1e12:g} TFLOP/s in bfloat16, {chip.bandwidth / 1e9:g} "
            f"GB/s to its memory and {chip.links / 1e9:g} GB/s to other chips ({chip.source})."
        )
    if (slices := count_slices(devices)) > 1:
        rate = f"{chip.network / 1e9:g} GB/s" if chip and chip.network else "a rate that is not published"
        print(f"There are {slices} slices; a chip's share of the network between them is {rate}.")
    print(f"Per chip and step:\n{HEADER}", flush=True)

    def fits(cost: Cost) -> bool:
        return cost.fits_chip and (not hbm_gib or cost.memory <= hbm_gib * GIB)

    costs = {}
    for bucket in buckets:
        costs[bucket] = compile_step(config, devices, bucket, num_boxes)
        print(row(bucket, costs[bucket], chip, hbm_gib, fits(costs[bucket])), flush=True)
    if values.bytes:
        for bucket, cost in costs.items():
            if cost.fits_chip:
                print(parts_table(bucket, cost), flush=True)
    if values.scaling and chip and all(map(fits, costs.values())):
        slowest = max(buckets, key=lambda bucket: costs[bucket].flops)
        compiling = sum(cost.seconds for cost in costs.values())
        rates = scaling.Rates(values.worker_rate, 1e6 * values.checkpoint_rate, compiling)
        work = scaling.measure_work(config, devices, slowest, num_boxes, count_images(config))
        rows = scaling.scale(costs[slowest], len(devices), chip, work, rates)
        if not rows:
            few = f"{work.train_images} images are fewer than a batch of {scaling.CHIPS[0]} chips"
            raise UserError(f"--scaling: {few}.")
        compiled = f"{values.topology}, {slowest[0]}x{slowest[1]}"
        print(scaling.describe(rows, chip, work, rates, compiled), flush=True)
    hungriest = max(costs, key=lambda bucket: costs[bucket].memory)

    def search(rematerialize: bool) -> int:
        """The largest number of images a chip can hold of the bucket that needs most."""

        def cost_of(images: int) -> Cost:
            if images * len(devices) == config.data.batch_size and rematerialize == config.rematerialize:
                return costs[hungriest]
            other = config.copy_and_resolve_references()
            other.update(rematerialize=rematerialize)
            other.data.batch_size = images * len(devices)
            other.optimizer.accumulate_steps = 1
            return compile_step(other, devices, hungriest, num_boxes)

        return largest_batch(cost_of, fits, int(hbm_gib * GIB), start=max(1, round(per_chip)))

    if values.suggest:
        if not hbm_gib:
            raise UserError("--suggest needs --hbm_gib: this machine's devices do not say how much memory they have.")
        needed = "" if fits(costs[hungriest]) else " The batch of the config needs rematerialisation or a smaller part."
        plain, rematerialized = search(False), search(True)
        print(
            f"Largest batch per chip: {plain} as it is, {rematerialized} with --config.rematerialize=True "
            f"({plain * len(devices)} and {rematerialized * len(devices)} over {len(devices)} chips).{needed}"
        )
    if not all(map(fits, costs.values())):
        largest = plain if values.suggest and not config.rematerialize else search(config.rematerialize)
        remedy = (
            f"the largest that fits is {largest * len(devices)}" if largest else "and not even one image a chip does"
        )
        raise UserError(
            f"config.data.batch_size {config.data.batch_size} does not fit {hbm_gib:g} GiB a chip on "
            f"{values.topology}; {remedy} ({largest} a chip)."
        )


def require_scalable(config: ConfigDict, topology: str, chip: Chip | None, devices: Sequence[jax.Device]) -> None:
    """Raises UserError where the sums of gradients of one slice cannot be told."""
    if chip is None or count_slices(devices) > 1 or len(devices) == 1:
        raise UserError(f"--scaling needs one slice of several chips, as in v5e:4x4; --topology is {topology}.")
    if config.mesh.model > 1:
        raise UserError(f"--scaling reckons data parallelism alone; config.mesh.model is {config.mesh.model}.")


def count_images(config: ConfigDict) -> tuple[int, int]:
    """Of an epoch and of an evaluation: the data set's, or else COCO's."""
    if config.data.name.startswith("shapes") or config.data.directory:
        return len(open_source(config.data, config.data.train_split)), len(
            open_source(config.data, config.data.eval_split)
        )
    return NOMINAL_IMAGES


def plan_buckets(config: ConfigDict, sizes: list[str]) -> tuple[list[tuple[int, int]], int]:
    """(padded sizes, box slots): the given sizes, or what train.py would plan. Sets config.model.num_classes as it."""
    for size in sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            raise UserError(f"--sizes has {size!r}; a size is HEIGHTxWIDTH, as in 832x1344.")
    if sizes:
        buckets = [size.split("x") for size in sizes]
        return [(int(h), int(w)) for h, w in buckets], config.data.max_boxes or NOMINAL_BOXES
    if config.data.name == "shapes" or config.data.directory:
        source = open_source(config.data, config.data.train_split)
        config.model.num_classes = source.classes.num_slots
        image_sizes, num_boxes = source.sizes, source.max_boxes
    else:
        image_sizes, num_boxes = nominal_sizes(), NOMINAL_BOXES
    buckets = training_buckets(image_sizes, config.data)
    return [(int(height), int(width)) for height, width in buckets], config.data.max_boxes or num_boxes


def local_memory(devices) -> int:
    """Bytes that a device of this machine can hold; 0 where it does not say, as CPUs do not."""
    return (devices[0].memory_stats() or {"bytes_limit": 0})["bytes_limit"]

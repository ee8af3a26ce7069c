"""Which images form which batch: a pure function of (image sizes, seed, epoch, config), the same on every host.

All images of a batch are padded to one of a few sizes, the buckets, because every padded size is a compile. Buckets
come from the distribution of output sizes that geometry.py draws, so they are the same in every epoch and every run on
a data set. An epoch is shuffled, its images go to the cheapest bucket that holds them, what does not fill a batch moves
on to a larger bucket, and the batches are shuffled again, so that sizes do not come in runs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import (
    BATCH_ORDER,
    ORDER,
    evaluation_geometry,
    resized_size,
    training_geometry,
    uniform,
)
from deperceiver_jax.errors import UserError, check_at_least

GRID = 32  # pixels; sides of buckets are multiples of this, the coarsest stride of the backbone
STEPS = 48  # and of so many times as much in very large images that a side has at most this many choices
SAMPLE = 50_000  # output sizes from which buckets are chosen, at least
NO_FIT = np.int64(1) << 32  # larger than any padded area in grid cells, small enough to be summed over all outputs


class Plan(NamedTuple):
    """S batches of B images. Every bucket is one padded size of the list that the plan was made with."""

    bucket: Int32[np.ndarray, " S"]
    example: Int32[np.ndarray, "S B"]  # position in the split; -1 where a ragged last batch is filled up


def training_buckets(sizes: Int32[np.ndarray, "N 2"], config: ConfigDict) -> Int32[np.ndarray, "K 2"]:
    """Padded sizes (height, width) for training: config.data.buckets of them, or fewer where fewer are as good."""
    sample = np.tile(sizes, (-(-SAMPLE // len(sizes)), 1))
    outputs = training_geometry(sample, 0, 0, config).size
    return choose_buckets(outputs, _largest_outputs(sizes, config), config.buckets)


def evaluation_buckets(sizes: Int32[np.ndarray, "N 2"], config: ConfigDict) -> Int32[np.ndarray, "K 2"]:
    """Padded sizes (height, width) for evaluation: config.data.eval_buckets of them, or fewer."""
    outputs = evaluation_geometry(sizes, config).size
    return choose_buckets(outputs, outputs, config.eval_buckets)


def training_plan(
    outputs: Int32[np.ndarray, "N 2"], buckets: Int32[np.ndarray, "K 2"], seed: int, epoch: int, batch_size: int
) -> Plan:
    """N // batch_size batches in random order; the images left over, fewer than one batch, sit this epoch out.

    outputs: the sizes that training_geometry drew for this seed and epoch.
    """
    steps = len(outputs) // batch_size
    order = np.argsort(uniform(seed, epoch, ORDER, (len(outputs),)), kind="stable")
    batches, rests = _group(outputs, order, buckets, batch_size)
    while len(batches) < steps:  # two rests that no bucket can unite: the fuller one takes images for a second time
        bucket, rest = rests.pop(int(np.argmax([len(rest) for _, rest in rests])))
        again = order[_fits(outputs[order], buckets[[bucket]])[:, 0]]
        again = again[~np.isin(again, rest)]
        batches.append((bucket, np.resize(np.concatenate([rest, again]), batch_size)))
    shuffled = np.argsort(uniform(seed, epoch, BATCH_ORDER, (steps,)), kind="stable")
    return Plan(
        np.array([batches[step][0] for step in shuffled], np.int32),
        np.stack([batches[step][1] for step in shuffled]).astype(np.int32),
    )


def evaluation_plan(outputs: Int32[np.ndarray, "N 2"], buckets: Int32[np.ndarray, "K 2"], batch_size: int) -> Plan:
    """Every example exactly once, bucket by bucket; at most two batches are ragged and filled up with -1."""
    batches, rests = _group(outputs, np.arange(len(outputs)), buckets, batch_size)
    for bucket, rest in rests:
        batches.append((bucket, np.concatenate([rest, np.full(batch_size - len(rest), -1)])))
    batches.sort(key=lambda batch: batch[0])
    return Plan(
        np.array([bucket for bucket, _ in batches], np.int32),
        np.stack([examples for _, examples in batches]).astype(np.int32),
    )


def host_rows(batch_size: int, process_index: int, process_count: int, field: str) -> slice:
    """The rows of a global batch that one host loads. `field` names the setting in the sentence of the UserError."""
    check_at_least(field, batch_size, 1)
    if batch_size % process_count:
        raise UserError(f"{field} is {batch_size}, which does not divide evenly over {process_count} processes.")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def choose_buckets(
    outputs: Int32[np.ndarray, "M 2"], largest: Int32[np.ndarray, "J 2"], count: int
) -> Int32[np.ndarray, "K 2"]:
    """At most `count` padded sizes that hold every output with as little padding as a search finds.

    The last one or two of them hold everything in `largest`: landscape images in one, portrait images in the other,
    or all in a single one. The others, in ascending order of area, are found by adding the most useful size until there
    are `count`, then moving one at a time while that helps. Areas are counted in integers, so that every machine finds
    the same buckets.
    """
    grid = GRID * -(-int(largest.max()) // (GRID * STEPS))
    top = -(-_top_sizes(largest, count) // grid)
    top = top[:1] if (top == top[0]).all() else top  # the two may become one on the grid
    cells, weight = np.unique(-(-outputs // grid), axis=0, return_counts=True)
    sides = [np.unique(np.concatenate([cells[:, axis], top[:, axis]])) for axis in (0, 1)]
    candidates = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2).astype(np.int64)
    padded = _padded_area(candidates, cells)
    with_top = _padded_area(top, cells).min(0)

    def best_addition(chosen):
        """(padded area of all outputs, candidate) of the best size to have beside the chosen ones."""
        total = np.minimum(padded, padded[chosen].min(0, initial=NO_FIT)).clip(max=with_top) @ weight
        return int(total.min()), int(total.argmin())

    chosen: list[int] = []
    reached = int(with_top @ weight)
    while len(chosen) < count - len(top):
        total, candidate = best_addition(chosen)
        if total == reached:
            break
        chosen, reached = [*chosen, candidate], total
    moved = True
    while moved:
        moved = False
        for position in range(len(chosen)):
            others = chosen[:position] + chosen[position + 1 :]
            total, candidate = best_addition(others)
            if total < reached:
                chosen, reached, moved = [*others[:position], candidate, *others[position:]], total, True
    found = candidates[chosen]
    return np.concatenate([found[np.argsort(found.prod(1), kind="stable")], top]).astype(np.int32) * grid


def _padded_area(buckets, cells):
    """Area of each bucket where it holds each cell, NO_FIT where it does not, [buckets, cells]."""
    return np.where((buckets[:, None] >= cells).all(-1), buckets.prod(1, dtype=np.int64)[:, None], NO_FIT)


def _top_sizes(largest, count):
    """One or two sizes, [1 or 2, 2], that hold everything in `largest`; the cheaper one first."""
    portrait = largest[:, 0] > largest[:, 1]
    tops = np.stack([side.max(0) for side in (largest[portrait], largest[~portrait]) if len(side)])
    if count < 2 or (tops.max(0) == tops).all(1).any():
        return tops.max(0, keepdims=True)
    return tops[np.argsort(tops.prod(1), kind="stable")]


def _largest_outputs(sizes, config):
    """Sizes that no draw exceeds: an output fits into their largest landscape or their largest portrait extent."""
    unique = np.unique(sizes, axis=0)
    outputs = []
    for scale in config.scales:
        if config.crop_probability < 1:
            outputs.append(resized_size(unique, scale, config.max_size))
        for crop_scale in config.crop_scales if config.crop_probability > 0 else ():
            side = resized_size(unique, crop_scale, None)
            low, high = np.minimum(config.crop_min, side), np.minimum(config.crop_max, side)
            for long in (0, 1):
                extent = np.where(np.arange(2) == long, high, low)  # the longest crop: its short side reaches
                extent = extent[extent[:, long] >= extent[:, 1 - long]]
                ratio = extent.max(1) / extent.min(1)
                # A shorter crop of the same image keeps the full scale where this one is limited by max_size.
                longest = np.minimum(scale * ratio, config.max_size + ratio / 2)
                outputs.append(np.where(np.arange(2) == long, np.ceil(longest)[:, None], scale))
    return np.concatenate(outputs).astype(np.int32)


def _group(outputs, order, buckets, batch_size):
    """Full batches and what is left: ([(bucket, examples [B])], [(bucket, fewer examples)]), at most two of the latter.

    Images go in the given order to the cheapest bucket that holds them. What does not fill a batch moves on to the next
    bucket that holds it; the images that could not move on are therefore the first to be taken.
    """
    fits = _fits(outputs, buckets)
    if not fits.any(1).all():
        raise ValueError(f"no bucket holds {outputs[~fits.any(1)][0].tolist()}; this is a bug in _largest_outputs")
    area = buckets.prod(1, dtype=np.int64)
    place = np.where(fits, area, area.max() + 1).argmin(1)
    batches, rests = [], []
    for bucket in range(len(buckets)):
        members = order[place[order] == bucket]
        later = fits[members] & (np.arange(len(buckets)) > bucket)
        movable = later.any(1)
        queue = np.argsort(movable, kind="stable")
        full = len(members) // batch_size * batch_size
        batches += [(bucket, batch) for batch in members[queue[:full]].reshape(-1, batch_size)]
        rest = queue[full:]
        moving = rest[movable[rest]]
        place[members[moving]] = later[moving].argmax(1)
        staying = members[rest[~movable[rest]]]
        if len(staying):
            rests.append((bucket, staying))
    return batches, rests


def _fits(outputs, buckets):
    """Whether each of N outputs fits into each of K buckets, [N, K]."""
    return (outputs[:, None] <= buckets).all(-1)

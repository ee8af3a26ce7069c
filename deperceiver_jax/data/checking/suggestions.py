"""What config.data would suit a folder's pictures and boxes, and why."""

import math
import time
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import training_geometry
from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.batches.plan import GRID, choose_buckets, training_buckets
from deperceiver_jax.data.batches.workers import IN_PROCESS_THREADS
from deperceiver_jax.data.checking.report import box_sides
from deperceiver_jax.data.checking.unprepared import Split

_SIDE = 26  # pixels that a small box shall have, as COCO's have at DETR's short side of 800
_SMALL = 10  # percent of the boxes are smaller than a small one
_LEAST, _MOST, _ENLARGED = 384, 1600, 2.0  # short side that is suggested, and how many times the pictures' own at most
_BUCKETS = (1, 2, 4, 8, 16)
_ENOUGH = 0.08  # of the pixels, which twice as many buckets must make useful
_SAMPLE = 64  # pictures that are loaded for the rate


class Suggestion(NamedTuple):
    """A field with its value, and why."""

    fields: dict[str, object]
    why: str


def suggest_scale(split: Split, config_data: ConfigDict) -> Suggestion:
    """The short side at which a small box has _SIDE pixels, and the other sizes in DETR's ratios to it.

    DETR has 480 to 800 for training, 1333 for the long side, and 400, 500, 600 before a crop of 384 to 600.
    """
    sides, short = box_sides(split), float(np.median(split.source.sizes.min(axis=1)))
    if not len(sides):
        return Suggestion({}, "There are no boxes from whose sizes a scale could be derived.")
    small = float(np.percentile(sides, _SMALL))
    wanted = min(max(short * _SIDE / small, _LEAST), _MOST, max(_ENLARGED * short, _LEAST))
    scale = math.ceil(wanted / GRID) * GRID
    fits = abs(scale - config_data.eval_scale) <= GRID
    scale = config_data.eval_scale if fits else scale
    share = scale / 800
    fields = {
        "scales": tuple(range(math.ceil(0.6 * scale / GRID) * GRID, scale + 1, GRID)),
        "max_size": round(1333 * share),
        "eval_scale": scale,
        "eval_max_size": round(1333 * share),
    }
    if config_data.crop_probability:
        fields["crop_scales"] = tuple(round(side * share) for side in (400, 500, 600))
        fields |= {"crop_min": round(384 * share), "crop_max": round(600 * share)}
    changed = {name: value for name, value in fields.items() if config_data[name] != value and not fits}
    reached, least = small * scale / short, ", the least that is suggested," if scale == _LEAST else ""
    return Suggestion(
        changed,
        f"a tenth of the boxes are below {small:.1f} pixels a side in pictures of {short:.0f}; at a short side of "
        f"{scale}{least} that is {reached:.1f}; in COCO at DETR's 800 it is {_SIDE}.",
    )


def suggest_buckets(split: Split, config_data: ConfigDict) -> Suggestion:
    """The fewest padded sizes after which more of them add little."""
    sizes = split.source.sizes
    geometry = training_geometry(sizes, 0, 0, config_data)
    largest = training_buckets(sizes, _with(config_data, buckets=1))
    useful = {}
    for count in _BUCKETS:
        buckets = choose_buckets(geometry.size, np.concatenate([geometry.size, largest]), count)
        fits = (geometry.size[:, None] <= buckets).all(-1)
        area = np.where(fits, buckets.prod(1, dtype=np.int64), np.iinfo(np.int64).max).min(1)
        useful[count] = geometry.size.prod(1, dtype=np.int64).sum() / area.sum()
    steps = zip(_BUCKETS[:-1], _BUCKETS[1:], strict=True)
    best = next((count for count, twice in steps if useful[twice] - useful[count] < _ENOUGH), _BUCKETS[-1])
    listed = ", ".join(f"{count}: {share:.0%}" for count, share in useful.items())
    return Suggestion(
        {} if config_data.buckets == best else {"buckets": best},
        f"useful pixels, not padding, by number of padded sizes, each of which is compiled once: {listed}.",
    )


def suggest_boxes(split: Split, config_data: ConfigDict, num_queries: int | None) -> Suggestion:
    """As many slots as the fullest picture needs, and whether the model has as many queries."""
    most = split.source.max_boxes
    fields: dict[str, object] = {"max_boxes": 0} if 0 < config_data.max_boxes < most else {}
    why = f"the fullest picture has {most} boxes, for which max_boxes=0 makes room"
    if num_queries is not None:
        short = "fewer, so that some could never be found" if num_queries < most else "which is enough"
        why += f"; the model has {num_queries} queries, {short}"
    return Suggestion(fields, f"{why}.")


def images_per_second(split: Split, config_data: ConfigDict) -> float:
    """Pictures of the training split that the threads of this process make, from files to augmented pixels."""
    positions = np.unique(np.linspace(0, len(split.source) - 1, _SAMPLE).astype(int))
    source = split.source.take(positions)
    batches = iter(TrainBatches(source, _with(config_data, batch_size=1, num_workers=0, buckets=1), seed=0))
    for _ in range(2 * IN_PROCESS_THREADS):  # until what is taken is made meanwhile, and not before
        next(batches)
    start = time.perf_counter()
    for _ in range(_SAMPLE):
        next(batches)
    return _SAMPLE / (time.perf_counter() - start)


def _with(config_data, **fields):
    changed = ConfigDict(config_data.to_dict())
    changed.update(fields)
    return changed

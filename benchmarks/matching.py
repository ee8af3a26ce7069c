"""How long matching takes: 96 problems as a step of six decoder layers and 16 COCO images has them.

    python benchmarks/matching.py
    python benchmarks/matching.py --queries=300 --slots=100
    python benchmarks/matching.py --layers=1 --queries=22932     # proposals of all tokens

The costs are those of random predictions, some of them near their boxes, under DETR's weights. Box counts are spread
like COCO's: mean 7, many images with one or two boxes, one with as many as there are slots. A batch's time is the
median of --rounds calls.
"""

import statistics
import sys
import timeit
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
from absl import app, flags
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.box_counts import coco_box_counts  # noqa: E402
from configs.base import base  # noqa: E402
from deperceiver_jax.losses import matcher  # noqa: E402
from deperceiver_jax.losses.classification import build_classification  # noqa: E402
from deperceiver_jax.losses.matcher import hungarian_assignment, match, matching_cost  # noqa: E402
from deperceiver_jax.sharding import make_mesh, shard_batch  # noqa: E402
from deperceiver_jax.structures import Batch, Predictions  # noqa: E402

LAYERS = flags.DEFINE_integer("layers", 6, "Decoder layers.")
IMAGES = flags.DEFINE_integer("images", 16, "Images.")
QUERIES = flags.DEFINE_integer("queries", 100, "Queries of each layer.")
SLOTS = flags.DEFINE_integer("slots", 63, "Box slots of each image, as many as COCO's fullest image needs.")
BATCHES = flags.DEFINE_integer("batches", 8, "Batches of that many images.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Calls for each batch and row.")


def box_counts(rng: np.random.Generator) -> np.ndarray:
    """[batches, images]: spread like COCO's, shuffled; one image is full and one in a hundred is empty."""
    num_images = BATCHES.value * IMAGES.value
    counts = coco_box_counts(num_images, SLOTS.value)
    counts[-1], counts[: round(num_images / 100)] = SLOTS.value, 0
    return rng.permutation(counts).reshape(BATCHES.value, IMAGES.value)


def make_problem(rng: np.random.Generator, counts: np.ndarray) -> tuple[Predictions, Batch]:
    """Predictions and targets; half of the boxes have a query nearby, as in the middle of training."""
    num_layers, num_images, num_queries, num_slots = LAYERS.value, IMAGES.value, QUERIES.value, SLOTS.value
    box_valid = np.arange(num_slots)[None] < counts[:, None]
    target = np.concatenate(
        [rng.uniform(0.1, 0.9, (num_images, num_slots, 2)), rng.beta(1, 4, (num_images, num_slots, 2))], axis=-1
    )
    shape = (num_layers, num_images, num_queries, 2)
    boxes = np.concatenate([rng.uniform(0.1, 0.9, shape), rng.beta(1, 4, shape)], axis=-1)
    near = target[None, :, ::2]
    boxes[:, :, : near.shape[2]] = near * rng.uniform(0.9, 1.1, (num_layers,) + near.shape[1:])
    predictions = Predictions(rng.normal(size=shape[:-1] + (92,)).astype(np.float32), boxes.astype(np.float32))
    size = np.full((num_images, 2), 8, np.int32)
    labels = rng.integers(1, 91, (num_images, num_slots), dtype=np.int32)
    image = np.zeros((num_images, 8, 8, 3), np.uint8)
    example = np.arange(num_images, dtype=np.int32)
    return predictions, Batch(image, size, size, example, target.astype(np.float32), labels, box_valid)


def optax_assignment(cost, box_valid):
    """optax's solver, for comparison: empty slots cost nothing, so they change no other pair."""
    cost = jnp.where(box_valid[None, :, None], cost, 0.0)
    return jax.vmap(jax.vmap(optax.assignment.hungarian_algorithm))(cost)


def padded_assignment(cost, box_valid):
    """What handing over all columns costs; empty ones hold arbitrary numbers."""
    del box_valid
    return [linear_sum_assignment(problem) for problem in cost.reshape(-1, *cost.shape[2:])]


def assignment_of_all_rows(cost, box_valid):
    """Ours without taking a problem apart."""
    with mock.patch.object(matcher, "MANY_QUERIES", cost.shape[2] + 1):
        return hungarian_assignment(cost, box_valid)


def milliseconds(call, problems) -> list[float]:
    """The median time of each problem."""

    def median(problem):
        jax.block_until_ready(call(*problem))  # compiles
        rounds = timeit.repeat(lambda: jax.block_until_ready(call(*problem)), number=1, repeat=ROUNDS.value)
        return 1e3 * statistics.median(rounds)

    return [median(problem) for problem in problems]


def main(_) -> None:
    if QUERIES.value < SLOTS.value:
        raise app.UsageError("--queries must not be fewer than --slots: the padded problems would be others.")
    rng = np.random.default_rng(0)
    config, mesh = base(), make_mesh(devices=jax.devices()[:1])
    counts = box_counts(rng)
    inputs = [make_problem(rng, batch_counts) for batch_counts in counts]
    inputs = [(jax.device_put(predictions), shard_batch(batch, mesh)) for predictions, batch in inputs]
    cost_of = jax.jit(partial(matching_cost, classification=build_classification(config.loss), config=config.matcher))
    on_device = [(cost_of(predictions, batch), batch.box_valid) for predictions, batch in inputs]
    on_host = [(np.ascontiguousarray(cost.swapaxes(2, 3)).swapaxes(2, 3), valid) for cost, valid in on_device]
    on_host = jax.tree.map(np.asarray, on_host)

    rows = [
        ("SciPy, real columns only", hungarian_assignment, on_host),
        ("`match` under jit, scipy", jax.jit(partial(match, backend="scipy", mesh=mesh)), on_device),
    ]
    if QUERIES.value >= matcher.MANY_QUERIES:
        rows.append(("SciPy, all queries", assignment_of_all_rows, on_host))
    rows += [
        ("SciPy, padded to all slots", padded_assignment, on_host),
        ("`match` under jit, device", jax.jit(partial(match, backend="device", mesh=mesh)), on_device),
        ("optax, vmapped, under jit", jax.jit(optax_assignment), on_device),
        ("`matching_cost` under jit", cost_of, inputs),
    ]
    print(f"{LAYERS.value} layers x {IMAGES.value} images, {QUERIES.value} queries, {SLOTS.value} box slots")
    print(f"{BATCHES.value} batches; boxes per image: mean {counts.mean():.1f}, largest {counts.max()}")
    print(
        f"jax {jax.__version__}, scipy {scipy.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}"
    )
    print("\n| what | ms, mean batch | ms, slowest batch |\n|---|---|---|")
    for name, call, problems in rows:
        times = milliseconds(call, problems)
        print(f"| {name} | {statistics.mean(times):.2f} | {max(times):.2f} |", flush=True)


if __name__ == "__main__":
    app.run(main)

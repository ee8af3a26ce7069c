"""One contract for both solvers: against SciPy, against brute force, and on everything that real batches can hold."""

import itertools
import os
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.optimize import linear_sum_assignment

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.losses import matcher
from deperceiver_jax.losses.classification import SigmoidFocal, SoftmaxNoObject
from deperceiver_jax.losses.matcher import LARGEST_COST, _match_on_host, hungarian_assignment, match, matching_cost
from deperceiver_jax.sharding import batch_sharding, make_mesh
from deperceiver_jax.structures import Batch, Predictions

L, B, Q, N = 2, 8, 6, 9
MESHES = {"one device": (1, 1), "eight devices": (8, 1), "four by two devices": (8, 2)}
CONTRACT = pytest.mark.parametrize(("backend", "mesh"), list(itertools.product(["scipy", "device"], MESHES)))


@cache
def solver(backend, mesh):
    num_devices, model = MESHES[mesh]
    mesh = make_mesh(model, devices=jax.devices()[:num_devices])
    jitted = jax.jit(partial(match, backend=backend, mesh=mesh))

    def solve(cost, box_valid):
        sharding = batch_sharding(mesh)
        assignment = jitted(np.float32(cost), jax.device_put(box_valid, sharding))
        return jax.tree.map(np.asarray, assignment)

    return solve


def prefix(counts, num_slots=N):
    return np.arange(num_slots)[None] < np.asarray(counts)[:, None]


def random_case(rng):
    return rng.normal(size=(L, B, Q, N)) * 5, prefix([1, 2, 3, 4, 5, 6, 3, 2])


def ties(rng):
    return rng.integers(0, 3, size=(L, B, Q, N)), prefix([6, 5, 6, 4, 6, 6, 5, 6])


def all_costs_equal(rng):
    return np.full((L, B, Q, N), -1.25), prefix([6, 5, 1, 9, 7, 6, 0, 6])


def empty_images(rng):
    return rng.normal(size=(L, B, Q, N)), prefix([0, 2, 0, 0, 5, 0, 1, 0])


def all_empty(rng):
    return rng.normal(size=(L, B, Q, N)), prefix([0] * B)


def more_boxes_than_queries(rng):
    return rng.normal(size=(L, B, Q, N)), prefix([9, 8, 7, 6, 9, 3, 0, 9])


def huge(rng):
    cost = rng.normal(size=(L, B, Q, N))
    cost[rng.uniform(size=cost.shape) < 0.3] = 1e30
    cost[rng.uniform(size=cost.shape) < 0.1] = -1e30
    return cost, prefix([6, 5, 9, 6, 6, 3, 7, 4])


def not_finite(rng):
    cost = rng.normal(size=(L, B, Q, N))
    for value in (np.nan, np.inf, -np.inf):
        cost[rng.uniform(size=cost.shape) < 0.15] = value
    cost[0, 0] = np.nan
    cost[1, 1, :, 2] = np.nan
    cost[1, 2, 3] = np.inf
    return cost, prefix([6, 5, 9, 6, 6, 3, 7, 4])


def garbage_in_empty_slots(rng):
    box_valid = prefix([3, 0, 5, 6, 2, 1, 4, 6])
    return np.where(box_valid[None, :, None], rng.normal(size=(L, B, Q, N)), np.nan), box_valid


def valid_slots_anywhere(rng):
    return rng.normal(size=(L, B, Q, N)), rng.uniform(size=(B, N)) < 0.5


CASES = (
    random_case,
    ties,
    all_costs_equal,
    empty_images,
    all_empty,
    more_boxes_than_queries,
    huge,
    not_finite,
    garbage_in_empty_slots,
    valid_slots_anywhere,
)


def finite(cost):
    """What the solvers are told: written again here, in float64."""
    cost = np.asarray(cost, np.float32).astype(np.float64)
    return np.where(np.isnan(cost), LARGEST_COST, np.clip(cost, -LARGEST_COST, LARGEST_COST))


def check_contract(assignment, cost, box_valid):
    """One to one, as many pairs as there can be, nothing in empty slots, and the total cost that SciPy finds."""
    query, matched = assignment
    assert query.dtype == np.int32 and matched.dtype == bool
    assert query.shape == matched.shape == cost.shape[:2] + cost.shape[3:]
    assert not (matched & ~box_valid[None]).any()
    assert not query[~matched].any()
    cost = finite(cost)
    for layer, image in np.ndindex(cost.shape[:2]):
        slots = np.flatnonzero(box_valid[image])
        chosen = np.flatnonzero(matched[layer, image])
        queries = query[layer, image, chosen]
        assert len(chosen) == min(len(slots), cost.shape[2])
        assert len(set(queries)) == len(queries) and (queries < cost.shape[2]).all()
        block = cost[layer, image][:, slots]
        best = block[linear_sum_assignment(block)].sum()
        scale = np.abs(block).max(initial=1)
        np.testing.assert_allclose(cost[layer, image, queries, chosen].sum(), best, rtol=0, atol=1e-6 * scale)


@CONTRACT
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract(backend, mesh, case):
    cost, box_valid = case(np.random.default_rng(3))
    check_contract(solver(backend, mesh)(cost, box_valid), cost, box_valid)


@pytest.mark.parametrize("backend", ["scipy", "device"])
def test_against_brute_force(backend):
    rng = np.random.default_rng(4)
    num_queries, num_slots = 5, 4
    counts = [4, 3, 2, 1, 4, 4, 3, 4]
    for draw in (rng.normal, lambda size: rng.integers(-2, 3, size=size)):
        cost = draw(size=(L, B, num_queries, num_slots))
        assignment = solver(backend, "one device")(cost, prefix(counts, num_slots))
        for layer, image in np.ndindex(L, B):
            slots = range(counts[image])
            best = min(
                sum(cost[layer, image, q, n] for n, q in enumerate(queries))
                for queries in itertools.permutations(range(num_queries), counts[image])
            )
            found = sum(cost[layer, image, assignment.query[layer, image, n], n] for n in slots)
            np.testing.assert_allclose(found, best, atol=1e-6)


@pytest.mark.parametrize("backend", ["scipy", "device"])
@pytest.mark.parametrize(("num_queries", "num_slots"), [(40, 25), (12, 30), (1, 3)])
def test_other_shapes(backend, num_queries, num_slots):
    rng = np.random.default_rng(5)
    cost = rng.uniform(-3, 9, size=(L, B, num_queries, num_slots))
    box_valid = prefix(rng.integers(0, num_slots + 1, size=B), num_slots)
    check_contract(solver(backend, "one device")(cost, box_valid), cost, box_valid)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract_in_parts(case, monkeypatch):
    """As of many queries, with groups of two queries."""
    monkeypatch.setattr(matcher, "MANY_QUERIES", 1)
    monkeypatch.setattr(matcher, "GROUP", 2)
    cost, box_valid = case(np.random.default_rng(3))
    check_contract(hungarian_assignment(finite(cost).astype(np.float32), box_valid), cost, box_valid)


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_most_of_many_queries_do_not_matter(spread):
    """With no spread all costs of a column are the same."""
    cost = np.random.default_rng(7).normal(size=(1, B, 2000, 18)) * spread + np.arange(18.0)
    box_valid = prefix([0, 3, 6, 18, 15, 9, 18, 6], 18)
    check_contract(hungarian_assignment(cost, box_valid), cost, box_valid)


@pytest.mark.parametrize("backend", ["scipy", "device"])
def test_no_box_slots_at_all(backend):
    assignment = solver(backend, "eight devices")(np.zeros((L, B, Q, 0)), np.zeros((B, 0), bool))
    assert assignment.query.shape == assignment.matched.shape == (L, B, 0)


def test_callback_of_accelerators_gives_the_same():
    cost, box_valid = random_case(np.random.default_rng(6))
    cost = cost.astype(np.float32)
    expected = hungarian_assignment(cost, box_valid)
    found = jax.jit(partial(_match_on_host, platform="gpu"))(cost, box_valid)
    for array, golden in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, golden)


@pytest.mark.parametrize("backend", ["scipy", "device"])
def test_no_gradient_and_no_error_under_grad(backend):
    cost, box_valid = random_case(np.random.default_rng(7))
    mesh = make_mesh()

    @jax.jit
    @jax.grad
    def gradient(cost):
        assignment = match(cost, box_valid, backend=backend, mesh=mesh)
        return jnp.sum(jnp.where(assignment.matched, cost[:, :, 0], 0.0))

    found = np.asarray(gradient(np.float32(cost)))
    np.testing.assert_array_equal(found[:, :, 0], np.broadcast_to(box_valid[None], (L, B, N)))
    assert not found[:, :, 1:].any()


def test_unknown_backend_is_a_sentence():
    with pytest.raises(UserError, match="config.matcher.backend is 'lap'; it can be scipy or device"):
        match(np.zeros((1, 8, 2, 2), np.float32), np.ones((8, 2), bool), backend="lap", mesh=make_mesh())


_MANY_LARGE_MATCHINGS = """
import jax, jax.numpy as jnp, numpy as np
from deperceiver_jax.losses.matcher import match
from deperceiver_jax.sharding import make_mesh, shard_batch
mesh = make_mesh()
assert mesh.shape["data"] == 8
rng = np.random.default_rng(0)
x, valid = shard_batch((rng.normal(size=(16, 6, 300, 100)), np.arange(100) < rng.integers(0, 9, (16, 1))), mesh)

@jax.jit
def step(x):
    def loss(x):
        cost = jnp.moveaxis(x, 1, 0)
        query = match(cost, valid, backend="scipy", mesh=mesh).query
        return jnp.mean(jnp.take_along_axis(cost, query[:, :, None], axis=2) ** 2)
    value, gradient = jax.value_and_grad(loss)(x)
    return value, x - gradient

for _ in range(STEPS):
    value, x = step(x)
    value.block_until_ready()
print("finished")
"""


def test_large_costs_of_more_devices_than_threads_do_not_stop_for_ever():
    """What pure_callback does on a CPU: see _match_on_host. A process of its own, with XLA's smallest thread pool."""
    flags = "--xla_force_host_platform_device_count=8"
    finished = subprocess.run(
        [sys.executable, "-c", _MANY_LARGE_MATCHINGS.replace("STEPS", "40")],
        env=os.environ | {"NPROC": "2", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stdout == "finished\n", finished.stderr[-2000:]


def make_problem(rng, num_logits=7):
    predictions = Predictions(
        logits=rng.normal(size=(L, B, Q, num_logits)).astype(np.float32),
        boxes=rng.uniform(0.1, 0.9, size=(L, B, Q, 4)).astype(np.float32),
    )
    fill = np.zeros((B, 2), np.int32)
    batch = Batch(
        image=np.zeros((B, 1, 1, 3), np.uint8),
        size=fill,
        original_size=fill,
        example=np.arange(B, dtype=np.int32),
        boxes=rng.uniform(0.1, 0.9, size=(B, N, 4)).astype(np.float32),
        labels=rng.integers(0, 6, size=(B, N), dtype=np.int32),
        box_valid=np.ones((B, N), bool),
    )
    return predictions, batch


def jitted_cost(classification, config):
    cost = jax.jit(partial(matching_cost, classification=classification, config=config))
    return lambda predictions, batch: np.asarray(cost(predictions, batch))


@pytest.mark.parametrize("classification", [SoftmaxNoObject(no_object_weight=0.1), SigmoidFocal(alpha=0.25, gamma=2.0)])
def test_matching_cost_by_hand(classification):
    predictions, batch = make_problem(np.random.default_rng(8))
    cost = jitted_cost(classification, base().matcher)(predictions, batch)
    assert cost.shape == (L, B, Q, N)
    layer, image, query, slot = 1, 5, 2, 7
    a, b = np.float64(predictions.boxes[layer, image, query]), np.float64(batch.boxes[image, slot])
    low = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2)
    high = np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    intersection = np.prod(np.maximum(high - low, 0))
    union = a[2] * a[3] + b[2] * b[3] - intersection
    hull = np.prod(np.maximum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2) - np.minimum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2))
    giou = intersection / union - (hull - union) / hull
    x = np.float64(predictions.logits[layer, image, query])
    if classification.has_no_object:
        of_class = -np.exp(x - np.log(np.exp(x).sum()))
    else:
        p = 1 / (1 + np.exp(-x))
        of_class = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    expected = of_class[int(batch.labels[image, slot])] + 5 * np.abs(a - b).sum() - 2 * giou
    np.testing.assert_allclose(cost[layer, image, query, slot], expected, rtol=1e-5)


def test_parts_of_the_cost_are_independent():
    predictions, batch = make_problem(np.random.default_rng(9))
    classification = SoftmaxNoObject(no_object_weight=0.1)
    weights = {"cost_class": 1.5, "cost_bbox": 0.25, "cost_giou": 3.0}

    def of(config):
        return jitted_cost(classification, config)(predictions, batch)

    parts = [of(ConfigDict(dict.fromkeys(weights, 0.0) | {name: weight})) for name, weight in weights.items()]
    np.testing.assert_allclose(of(ConfigDict(weights)), sum(parts), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="all 0"):
        of(ConfigDict(dict.fromkeys(weights, 0.0)))


def test_a_part_of_weight_zero_cannot_spoil_the_cost():
    predictions, batch = make_problem(np.random.default_rng(10))
    predictions = predictions._replace(logits=np.full_like(predictions.logits, np.nan))
    config = base().matcher
    config.cost_class = 0.0
    cost = jitted_cost(SoftmaxNoObject(no_object_weight=0.1), config)(predictions, batch)
    assert np.isfinite(cost).all()


def test_cost_has_no_gradient_and_is_float32():
    predictions, batch = make_problem(np.random.default_rng(11))
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), predictions)
    config = dict(classification=SigmoidFocal(alpha=0.25, gamma=2.0), config=base().matcher)
    assert jax.eval_shape(partial(matching_cost, **config), half, batch).dtype == jnp.float32
    gradients = jax.jit(jax.grad(lambda predictions: jnp.sum(matching_cost(predictions, batch, **config))))(predictions)
    for gradient in jax.tree.leaves(jax.device_get(gradients)):
        assert not gradient.any()

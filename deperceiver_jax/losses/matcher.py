"""Which query answers for which box: the one-to-one assignment of least total cost, image by image, layer by layer.

It is what makes DETR a set predictor: a box is claimed by exactly one query, so a second prediction of the same object
counts as wrong and nothing has to suppress duplicates afterwards. Two solvers share one contract: SciPy on each host,
and a `lax.while_loop` on the device, for pods where the trip to the host costs more than a slower solver.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from deperceiver_jax.boxes import box_cxcywh_to_xyxy, generalized_box_iou
from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.losses.assignment_on_device import assign_on_device
from deperceiver_jax.losses.classification import Classification
from deperceiver_jax.sharding import ALL_DEVICES
from deperceiver_jax.structures import Assignment, Batch, Predictions

# No assignment needs costs beyond this: with the published weights they stay below 100. Small enough for float32 to
# tell ordinary costs apart next to it.
LARGEST_COST = 1e5
BACKENDS = ("scipy", "device")
MANY_QUERIES = 1000  # from which on a problem is taken apart first
GROUP = 32  # queries looked at together


def matching_cost(
    predictions: Predictions, batch: Batch, classification: Classification, config
) -> Float[Array, "L B Q N"]:
    """Cost of giving box slot n to query q, in float32 and without gradient; empty slots hold numbers of no meaning.

    cost_class * classification + cost_bbox * L1 distance (cxcywh) + cost_giou * -GIoU, weights from `config.matcher`.
    A part of weight 0 is not computed. Source: DETR's HungarianMatcher.
    """
    logits = lax.stop_gradient(predictions.logits).astype(jnp.float32)
    predicted = lax.stop_gradient(predictions.boxes).astype(jnp.float32)[:, :, :, None]
    target = batch.boxes.astype(jnp.float32)[None, :, None]
    parts = []
    if config.cost_class:
        parts.append(config.cost_class * classification.cost(logits, batch.labels))
    if config.cost_bbox:
        # Written out, as XLA's CPU code for a sum over an axis of 4 takes several times longer.
        distance = sum(jnp.abs(predicted[..., i] - target[..., i]) for i in range(4))
        parts.append(config.cost_bbox * distance)
    if config.cost_giou:
        overlap = generalized_box_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target))
        parts.append(-config.cost_giou * overlap)
    if not parts:
        raise UserError("config.matcher has cost_class, cost_bbox and cost_giou all 0, so no query suits any box best.")
    return sum(parts)


def match(cost: Float[Array, "L B Q N"], box_valid: Bool[Array, "B N"], *, backend: str, mesh: Mesh) -> Assignment:
    """The assignment of least total cost for each layer and image: min(Q, number of boxes) pairs.

    Every device solves its own images, on its own host for `scipy`.
    NaN counts as the largest cost there is, and costs beyond LARGEST_COST are cut to it, so there always is an answer;
    stopping at a non-finite loss is the training loop's part. Where several assignments cost the same, either
    solver may return any of them. More boxes than queries are legal: those whose cost is least are matched.
    """
    check_choice("config.matcher.backend", backend, BACKENDS)
    on_host = partial(_match_on_host, platform=mesh.devices.flat[0].platform)
    solve = on_host if backend == "scipy" else assign_on_device
    if not cost.shape[3]:
        empty = cost.shape[:2] + (0,)
        return Assignment(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, bool))
    cost = jnp.nan_to_num(lax.stop_gradient(cost).astype(jnp.float32), nan=LARGEST_COST)
    per_device = jax.shard_map(
        solve,
        mesh=mesh,
        in_specs=(PartitionSpec(None, ALL_DEVICES), PartitionSpec(ALL_DEVICES)),
        out_specs=PartitionSpec(None, ALL_DEVICES),
        check_vma=False,  # the solvers' loops start from constants, which are the same on all devices
    )
    return per_device(jnp.clip(cost, -LARGEST_COST, LARGEST_COST), box_valid)


def hungarian_assignment(cost: Float[np.ndarray, "L B Q N"], box_valid: Bool[np.ndarray, "B N"]) -> Assignment:
    """SciPy's solver on the real columns of each image; NumPy in, NumPy out. `cost` must be finite.

    Only the real columns are handed over: padded to 100 columns, the problems of COCO take tens of times longer.
    """
    num_layers, num_images, num_queries, num_slots = cost.shape
    solve = linear_sum_assignment if num_queries < MANY_QUERIES else _solve_in_parts
    query = np.zeros((num_layers, num_images, num_slots), np.int32)
    matched = np.zeros((num_layers, num_images, num_slots), bool)
    for image in range(num_images):
        slots = np.flatnonzero(box_valid[image])
        if not slots.size:
            continue
        for layer in range(num_layers):
            position, chosen = solve(cost[layer, image].T[slots])
            query[layer, image, slots[position]] = chosen
            matched[layer, image, slots[position]] = True
    return Assignment(query, matched)


def _solve_in_parts(cost: Float[np.ndarray, "N Q"]) -> tuple[np.ndarray, np.ndarray]:
    """(boxes, queries) of the least sum over many queries, as problems whose solutions together are one of the whole.

    A box never needs more than its cheapest queries, as many as there are boxes that compete for them: one of those is
    always free. Boxes that share such queries compete, and then all of them together need so many more. Among the
    22,932 proposals of an image, most boxes share none of these with another.
    """
    num_boxes, num_queries = cost.shape
    if num_queries <= num_boxes:
        return linear_sum_assignment(cost)
    cheapest = np.stack([_cheapest(row, num_boxes) for row in cost])
    queries, cheapest = np.unique(cheapest, return_inverse=True)  # numbered among those that matter
    group, num_groups = np.arange(num_boxes), num_boxes + 1
    while group.max() + 1 < num_groups:
        num_groups = group.max() + 1
        needed = np.bincount(group)[group]  # queries of each box
        of_box, rank = np.nonzero(np.arange(num_boxes)[None] < needed[:, None])
        query = cheapest[of_box, rank]
        edges = (np.ones(query.size, bool), (of_box, num_boxes + query))
        _, labels = connected_components(csr_array(edges, shape=2 * (num_boxes + queries.size,)), directed=False)
        group = np.unique(labels[:num_boxes], return_inverse=True)[1]
    boxes, chosen = [], []
    for i in range(num_groups):
        members, candidates = np.flatnonzero(group == i), queries[np.unique(query[group[of_box] == i])]
        position, column = linear_sum_assignment(cost[np.ix_(members, candidates)])
        boxes.append(members[position])
        chosen.append(candidates[column])
    return np.concatenate(boxes), np.concatenate(chosen)


def _cheapest(cost: Float[np.ndarray, " Q"], count: int) -> Int64[np.ndarray, " count"]:
    """The places of the `count` least numbers, in order.

    Of groups of numbers, `count` have one that is no more than the `count`-th least of their least ones: only numbers
    up to that are sorted.
    """
    least = cost[: cost.size // GROUP * GROUP].reshape(GROUP, -1).min(axis=0)
    if least.size > count:
        candidates = np.flatnonzero(cost <= np.partition(least, count - 1)[count - 1])
    else:
        candidates = np.arange(cost.size)
    return candidates[np.argsort(cost[candidates], kind="stable")[:count]]


def _match_on_host(cost, box_valid, *, platform: str) -> Assignment:
    """One call to SciPy for all layers and images of this device.

    On a GPU or TPU `pure_callback` brings the costs to the host. On the CPU it must not be used: it copies arguments
    of more than 100 kB on the very thread pool whose thread is waiting in the callback, and with as many simulated
    devices as threads everything waits for ever (jax issue 24255 is of this kind). `buffer_callback` lets NumPy look
    at the device's own memory: no copy, nothing to wait for.
    """
    shape = cost.shape[:2] + box_valid.shape[1:]
    answer = Assignment(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_))
    by_slot = cost.swapaxes(2, 3)  # a box's costs side by side, as SciPy wants them
    if platform == "cpu":
        return buffer_callback(_write_assignment, answer)(by_slot, box_valid)
    return jax.pure_callback(_return_assignment, answer, by_slot, box_valid, vmap_method="sequential")


def _write_assignment(context, answer, by_slot, box_valid) -> None:
    del context
    result = _return_assignment(by_slot, box_valid)
    np.asarray(answer.query)[...] = result.query
    np.asarray(answer.matched)[...] = result.matched


def _return_assignment(by_slot, box_valid) -> Assignment:
    return hungarian_assignment(np.asarray(by_slot).swapaxes(2, 3), np.asarray(box_valid))

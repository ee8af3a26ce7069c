"""Our training beside the official one, from the same weights and batches: every figure, per model, with its limit.

    python -m tests.parity [--only=detr_r50]

prints the table; test_parity.py asserts all of it but training in float32. The official side is in
golden/training_*.npz (see the README there), so nothing but this package is needed. What runs is what trains: the
detector, `set_loss` and the step of `build_training`.

Gradients, updates and the trajectory are compared in float64 on both sides. The table shows them in float32 too,
but there a ReLU whose input is zero up to rounding may be on in one program and off in the other, which moves single
gradients by some 1e-3 and grows tenfold with every step of the trajectory.
"""

import argparse
import contextlib
import importlib
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from deperceiver_jax import models
from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.losses.matcher import hungarian_assignment, matching_cost
from deperceiver_jax.models.layers.compute import EXACT
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Batch
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.train_state import TrainState
from deperceiver_jax.weights.name_rules import from_torch, to_torch
from deperceiver_jax.weights.tables import FAMILIES
from tests.golden import cases
from tests.seeded import seeded_array

GOLDEN = Path(__file__).parent / "golden"
ZERO_GRADIENT = 1e-6  # of the whole gradient's norm: below it a parameter's gradient is rounding noise on both sides
NOISE_FACTOR = 3.0  # in float32, how much further than the official float32 from its own float64 we may be


class Figure(NamedTuple):
    """One measured difference and the largest that is accepted."""

    name: str
    value: float
    limit: float
    where: str = ""  # the worst place

    @property
    def passes(self) -> bool:
        return self.value <= self.limit  # False for NaN


@contextlib.contextmanager
def double_precision():
    """Runs this package in float64: wherever its code says jnp.float32, it gets float64 meanwhile."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setitem(models._COMPUTE_TYPES, "float32", jnp.float64)
        patch.setitem(EXACT, "dtype", jnp.float64)
        yield


class Side:
    """Our half of a case: a detector with the seeded weights, its loss and its optimiser, in the current precision."""

    def __init__(self, case: cases.Case):
        self.case = case
        family, variant = case.config.split(":")
        self.config = config = importlib.import_module(f"configs.{family}").get_config(variant)
        config.model.dropout = 0.0
        config.data.batch_size = len(case.sizes)
        config.optimizer.drop_epochs = tuple(range(cases.DROP_EVERY, cases.STEPS, cases.DROP_EVERY))
        config.update_from_flattened_dict(dict(case.changes))
        self.rules = FAMILIES[config.model.name](config.model)
        self.classification = build_classification(config.loss)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        training = build_training(config, self.mesh, steps_per_epoch=1, num_steps=cases.STEPS)
        self.plan, _, self.loss, self.train_step = training
        real = jnp.zeros((), jnp.float32).dtype
        batches = [Batch(**cases.batch(case, step)) for step in range(cases.STEPS)]
        self.batches = [batch._replace(boxes=batch.boxes.astype(real)) for batch in batches]

    def state(self) -> TrainState:
        """Before the first step, with the parameters that the official side drew from the same names."""
        abstract = self.plan.abstract
        shapes = {path: x.shape for path, x in {**abstract.params, **abstract.frozen}.items()}
        empty = to_torch({path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}, self.rules)
        official = {name: seeded_array(name, array.shape, self.case.seed(name)) for name, array in empty.items()}
        arrays, _ = from_torch(official, shapes, self.rules, source="the seeded weights")
        real = jnp.zeros((), jnp.float32).dtype
        params, frozen = (
            {path: arrays[path].astype(real) for path in part} for part in (abstract.params, abstract.frozen)
        )
        moments = jax.eval_shape(self.plan.optimizer.init, params)
        opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), moments)  # as Adam's are at first
        state = TrainState(np.zeros((), np.int32), params, frozen, opt_state, {})
        # Where the step will leave it, so that the second step finds what the first was compiled for.
        return jax.tree.map(lambda x, abstract: jax.device_put(x, abstract.sharding), state, abstract)


def predict(case: cases.Case):
    """(predictions, query of each box slot, loss terms, detections) of the first batch.

    With two stages the last layer of the second are the tokens that the boxes are matched with as proposals.
    """
    side = Side(case)
    state = side.state()
    arrays, batch = {**state.frozen, **state.params}, side.batches[0]

    def answer(arrays, batch):
        predictions = side.plan.skeleton.merge(arrays)(*normalize_images(batch.image, batch.size))
        costs = [matching_cost(predictions, batch, side.classification, side.config.matcher)]
        if predictions.proposals is not None:
            any_object = batch._replace(labels=jnp.zeros_like(batch.labels))
            costs.append(matching_cost(predictions.proposals, any_object, side.classification, side.config.matcher))
        kept = dict(classification=side.classification, max_detections=side.config.eval.max_detections)
        found = postprocess(predictions, batch.original_size, **kept)
        return predictions, costs, side.loss(predictions, batch)[1], found

    # It runs once: compiled in half the time.
    answer = jax.jit(answer).lower(arrays, batch).compile({"xla_backend_optimization_level": 0})
    predictions, costs, terms, detections = jax.device_get(answer(arrays, batch))
    assignments = [hungarian_assignment(cost, batch.box_valid) for cost in costs]
    query = [np.where(assignment.matched, assignment.query, -1) for assignment in assignments]
    return predictions, np.concatenate(query), terms, detections


def train(case: cases.Case, steps: int = cases.STEPS, *, optimized: bool = True):
    """(losses of all steps, gradient of the first, parameters after it), arrays in the official layout and names."""
    side = Side(case)
    state = side.state()
    # With a whole backbone it computes longer than it compiles.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    train_step = side.train_step.lower(state, side.batches[0]).compile(options if optimized else None)
    losses, first = [], None
    for batch in side.batches[:steps]:
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        if first is None:
            gradients = _gradients(state, float(metrics["grad_norm"]), side.config.optimizer)
            first = [to_torch(arrays, side.rules) for arrays in (gradients, jax.device_get(state.params))]
    return np.array(losses), *first


def _gradients(state: TrainState, norm: float, config: ConfigDict) -> dict[str, np.ndarray]:
    """The gradient of the first step, before clipping, out of Adam's first moment: (1 - b1) * factor * gradient."""
    factor = min(1.0, config.clip_norm / (norm + 1e-6)) * (1 - config.b1)
    return {path: moment / factor for path, moment in jax.device_get(optax.tree.get(state.opt_state, "mu")).items()}


# ------------------------------------------------------------------------------------------------------- the figures


def compare(
    name: str, *, answers: bool = True, steps: int = cases.STEPS, single: bool = False, optimized: bool = True
) -> list[Figure]:
    """All figures of one case: of the first batch's answers and loss, and of as many steps of training.

    `single` adds those of training in float32. A program that is not `optimized` compiles in a third of the time.
    """
    golden = np.load(GOLDEN / f"training_{name}.npz")
    case = cases.CASES[name]
    start = time.perf_counter()
    figures = []
    if answers:
        predictions, query, terms, detections = predict(case)
        figures += [
            *_compare_predictions(predictions, query, golden, case.query_stride),
            *_compare_proposals(predictions, golden),
            _compare_terms(terms, golden),
            *_compare_detections(detections, golden),
        ]
    if steps:
        with double_precision():
            trained = train(case, steps, optimized=optimized)
            figures += _compare_training(*trained, golden, "float64", gradient=1e-10, update=1e-12, loss=1e-10)
    figures.append(Figure("seconds", time.perf_counter() - start, np.inf))
    if single:
        figures += _compare_training(*train(case), golden, "float32", gradient=1e-3, update=1e-6, loss=1e-3)
    return figures


def _worst(name: str, values: np.ndarray, limits: np.ndarray, names) -> Figure:
    """The figure nearest to its limit, or furthest beyond it."""
    worst = int(np.argmax(np.nan_to_num(values / limits, nan=np.inf)))
    return Figure(name, float(values[worst]), float(limits[worst]), str(names[worst]))


def _compare_predictions(predictions, query, golden, stride: int) -> list[Figure]:
    """Of every layer, at the stored queries; matchings of all queries, and of all tokens where they propose."""
    layers = len(golden["boxes"])
    logits, boxes = (x[-layers:, :, ::stride] for x in (predictions.logits, predictions.boxes))
    difference = max(
        np.max(np.abs(logits[-1] - golden["logits"])),
        np.max(np.abs(logits[:-1, :, :: cases.QUERY_STRIDE] - golden["auxiliary_logits"]), initial=0),
    )
    return [
        Figure("logits", float(difference), _prediction_limit(golden, "logits")),
        Figure("boxes", float(np.max(np.abs(boxes - golden["boxes"]))), _prediction_limit(golden, "boxes")),
        Figure("assignments that differ", float(np.sum(query[-len(golden["query"]) :] != golden["query"])), 0.0),
    ]


def _compare_proposals(predictions, golden) -> list[Figure]:
    """Of the stored tokens, and which of all tokens become queries, in their order; nothing without two stages."""
    if "chosen" not in golden:
        assert predictions.proposals is None
        return []
    chosen = jax.lax.top_k(predictions.proposals.logits[0, :, :, 0], golden["chosen"].shape[1])[1]
    figures = [Figure("chosen proposals that differ", float(np.sum(chosen != golden["chosen"])), 0.0)]
    for field, name in (("logits", "proposal_logits"), ("boxes", "proposal_boxes")):
        difference = getattr(predictions.proposals, field)[0, :, :: cases.PROPOSAL_STRIDE] - golden[name]
        limit = _prediction_limit(golden, name)
        figures.append(Figure(f"{field} of the proposals", float(np.max(np.abs(difference))), limit))
    return figures


def _prediction_limit(golden, name: str) -> float:
    return max(1e-4, NOISE_FACTOR * float(golden[f"{name}_noise"]))


def _compare_terms(terms, golden) -> Figure:
    """Relative. Cardinality errors that we do not count train nothing: of the layers before the last, and of sigmoid
    classes, where they compare with a class."""
    official = dict(zip(golden["term_names"].tolist(), golden["terms"].astype(np.float64), strict=True))
    ours = {name.replace("loss_focal", "loss_ce"): float(value) for name, value in terms.items()}
    names = [name for name in official if name in ours or not name.startswith("cardinality_error")]
    values = np.array([abs(ours[name] - official[name]) / max(abs(official[name]), 1e-6) for name in names])
    return _worst("loss terms, relative", values, np.full(len(names), 1e-5), names)


def _compare_detections(detections, golden) -> list[Figure]:
    """Ours are sorted by score, the official ones may be in the order of queries: pairs have the nearest boxes, and of
    several detections of one query, whose boxes are the same, the same label."""
    values = []
    for b, official in enumerate(golden["detections_boxes"]):
        distance = np.max(np.abs(detections.boxes[b][:, None] - official[None]), axis=-1)
        other_label = detections.labels[b][:, None] != golden["detections_labels"][b][None]
        pair = np.argmin(distance + other_label, axis=1)
        assert sorted(pair) == list(range(len(official))), "Several detections are nearest to one official box."
        scores, labels = golden["detections_scores"][b][pair], golden["detections_labels"][b][pair]
        assert np.all(np.diff(detections.scores[b]) <= 0)
        values.append(
            (
                np.sum(labels != detections.labels[b]),
                np.max(np.abs(scores - detections.scores[b])),
                np.max(distance[np.arange(len(pair)), pair]),
            )
        )
    labels, scores, boxes = np.max(np.array(values, np.float64), axis=0).tolist()
    return [
        Figure("detections: labels that differ", labels, 0.0),
        Figure("detections: scores", scores, 1e-5),
        Figure("detections: boxes, pixels", boxes, 1e-2),
    ]


def _compare_training(losses, gradients, updated, golden, precision, *, gradient, update, loss) -> list[Figure]:
    """Gradients and parameters after the first step, parameter by parameter, and the losses of all steps.

    The norm of a gradient's error is estimated from its random projections. Gradients that are zero in exact
    arithmetic (all values of an attention alike) are only compared with the norm of the whole gradient.
    """
    names = golden["parameter_names"].tolist()
    assert sorted(names) == sorted(gradients), set(names) ^ set(gradients)
    suffix, noise = ("_float64", 0.0) if precision == "float64" else ("", NOISE_FACTOR)
    official = {key: golden[key + suffix].astype(np.float64) for key in ("gradients", "updated", "losses")}
    rounding = {key: np.abs(golden[key] - golden[f"{key}_float64"]) for key in official}

    norms = golden["gradient_norms"]
    zero = norms < ZERO_GRADIENT * np.linalg.norm(norms)
    projected = np.stack([cases.project(name, gradients[name]) for name in names])
    scale = np.where(zero, np.linalg.norm(norms), norms)
    limits = np.where(zero, ZERO_GRADIENT, np.maximum(gradient, noise * _rms(rounding["gradients"]) / scale))
    figures = [
        _worst(f"{precision} gradients, relative", _rms(projected - official["gradients"]) / scale, limits, names)
    ]

    sampled = np.stack([cases.sample(name, updated[name]) for name in names])
    limits = np.maximum(update, noise * np.max(rounding["updated"], axis=1))
    difference = np.max(np.abs(sampled - official["updated"]), axis=1)
    # What float32 makes of a zero gradient, noise over noise, differs by more; it moves no prediction.
    real = np.flatnonzero(~zero | (precision == "float64"))
    figures.append(
        _worst(f"{precision} parameters after a step", difference[real], limits[real], np.array(names)[real])
    )

    steps = [f"step {step}" for step in range(len(losses))]
    limits = np.maximum(loss, noise * np.maximum.accumulate(rounding["losses"]) / official["losses"])[: len(steps)]
    difference = np.abs(losses / official["losses"][: len(steps)] - 1)
    return [*figures, _worst(f"{precision} trajectory of losses, relative", difference, limits, steps)]


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis=-1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints how far we are from the official code.")
    parser.add_argument("--only", choices=cases.CASES, nargs="*", default=list(cases.CASES))
    for name in parser.parse_args().only:
        print(f"{name}\n{'-' * len(name)}")
        for figure in compare(name, single=True):
            verdict = "" if figure.passes else "  BEYOND"
            print(f"{figure.name:44}{figure.value:10.2e}  of {figure.limit:8.1e}  {figure.where}{verdict}", flush=True)
        print()


if __name__ == "__main__":
    main()

"""Why a run has not learned, by what it shows: its log, its pictures as the detector sees them, its evaluations.

`likely_reason` goes from what is certain to what is likely. A reason is given only where it was seen: that a rate is
far too high, for example, says the size of the steps that were taken beside a loss that did not fall.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from deperceiver_jax.data import Source
from deperceiver_jax.data.batches.geometry import evaluation_geometry
from deperceiver_jax.training.optimizer import global_norm
from deperceiver_jax.training.train_state import Plan, TrainState

# Of the parameters' norm, that a step changes; steps that learn change 0.1 % to 0.5 % of it.
FAR_TOO_HIGH = 0.1
TOO_HIGH = 0.02  # where the loss does not fall either
FAR_TOO_LOW = 2e-5
FALLEN = 0.9  # of the first loss, below which a loss has fallen
STILL_FALLING = 0.97  # of the loss before, that the last third of a run still reaches
FAR_SMALLER = 0.5  # than a cell, in sides

RIPE = (3, 300)  # evaluations and steps, after which a run is looked at once
NO_AP = 0.0005  # what is written as 0.000
NO_SCORE = 0.1  # of the focal loss, whose scores begin at 0.01
SAME_BOX = 0.01  # of an image's sides
ONE_CLASS = 0.9  # of the targets, which a data set that has several classes may have in one of them

Rows = Sequence[Mapping[str, float]]


class Circumstances(NamedTuple):
    """What is known of a run before its first step."""

    config: ConfigDict  # the whole one
    untrained: bool  # parts of the backbone are frozen, and nothing was loaded into them
    params_norm: float  # L2, of what is trained
    stride: int  # of the finest map that becomes tokens, in pixels
    fullest: int  # targets of the picture that has most of them
    side: float  # of the median target, the root of its area, in pixels of the image that the detector sees


def circumstances(config: ConfigDict, plan: Plan, state: TrainState, source: Source) -> Circumstances:
    """Of a run that trains on `source` from `state`."""
    detector = plan.skeleton.merge({**plan.abstract.params, **plan.abstract.frozen})
    return Circumstances(
        config,
        untrained=bool(untrained_backbone(plan, config)),
        params_norm=float(jax.jit(global_norm)(state.params)),
        stride=min(detector.token_strides),
        fullest=source.max_boxes,
        side=float(np.median(_sides(source, config.data))),
    )


def untrained_backbone(plan: Plan, config: ConfigDict) -> list[str]:
    """Paths of the backbone's arrays that are frozen although nothing is loaded into them: random, or never fitted."""
    if config.init_from or config.model.backbone.weights:
        return []
    return sorted(path for path in plan.abstract.frozen if path.startswith("backbone/"))


def likely_reason(run: Circumstances, rows: Rows) -> str:
    """The first reason that holds, as a clause; "" where none does. `rows` are the training lines of metrics.jsonl."""
    rows = [row for row in rows if row["update_norm"] == row["update_norm"]]
    return next((reason for look in REASONS if (reason := look(run, rows))), "") if rows else ""


def does_not_learn(
    known: Circumstances, rows: Rows, evaluations: Rows, results: Sequence[Mapping], source: Source, *, last: int
) -> str:
    """A sentence, once in a run, when its third evaluation, or the only ones it has, show that it learns nothing.

    rows, evaluations: lines of metrics.jsonl. results: of the newest evaluation, on `source`, in COCO's format. last:
    the run's last step. "" for a run that learns, and at any other time.
    """
    count, step = RIPE
    ripe = [row for number, row in enumerate(evaluations, 1) if number >= count and row["step"] >= step]
    if len(ripe) != 1 and (ripe or evaluations[-1]["step"] != last):
        return ""
    if found := signs(known.config, rows, evaluations, results, source):
        return f"The run does not learn: {' and '.join(found)}.{because(likely_reason(known, rows))}"
    return ""


def signs(config: ConfigDict, rows: Rows, evaluations: Rows, results: Sequence[Mapping], source: Source) -> list[str]:
    """What shows that nothing is learned, as clauses; see does_not_learn."""
    found = []
    if 0 <= max(row["AP"] for row in evaluations) < NO_AP:
        plural = "s" if len(evaluations) > 1 else ""
        found.append(f"AP is 0.000 after {len(evaluations)} evaluation{plural}")
    detections: dict[int, list[Mapping]] = {}
    for result in results:
        detections.setdefault(result["image_id"], []).append(result)
    images = [detections.get(int(image_id), []) for image_id in source.image_ids]
    if _one_box(images, source):
        found.append("all queries of an image give one box")
    if config.loss.classification == "softmax_no_object":
        if rows and rows[-1]["class_error"] == 100:
            found.append("no query is matched above the background")
    elif max((result["score"] for result in results), default=0.0) < NO_SCORE:
        found.append(f"no score is above {NO_SCORE}")
    if name := _one_class(images, source):
        found.append(f"all labels are {name}")
    return found


def _one_box(images: Sequence[Sequence[Mapping]], source: Source) -> bool:
    """Whether the boxes of each image are one and the same."""
    several = [(row, size) for row, size in zip(images, source.sizes, strict=True) if len(row) > 1]
    spreads = [np.ptp([result["bbox"] for result in row], axis=0).max() / size.max() for row, size in several]
    return bool(spreads) and max(spreads) < SAME_BOX


def _one_class(images: Sequence[Sequence[Mapping]], source: Source) -> str:
    """The class that the best answers of all images have, as many of each as it has targets; "" if there are several,
    or if nearly all targets have that one."""
    targets = [source.targets(position)[1] for position in range(len(source))]
    counts = np.unique(np.concatenate(targets), return_counts=True)[1]
    if len(counts) < 2 or counts.max() > ONE_CLASS * counts.sum():
        return ""
    best = [
        sorted(row, key=lambda result: -result["score"])[: len(own)] for row, own in zip(images, targets, strict=True)
    ]
    categories = {result["category_id"] for row in best for result in row}
    if len(categories) != 1:
        return ""
    return source.classes.names[source.classes.category_ids.index(categories.pop())]


def because(reason: str) -> str:
    """A sentence to append; nothing where no reason is known."""
    return f" The likely reason: {reason}." if reason else ""


def _weight_of_zero(run: Circumstances, rows: Rows) -> str:
    weights = run.config.loss
    if not weights.weight_class:
        return "config.loss.weight_class is 0, so no query learns which class it is"
    if not weights.weight_bbox and not weights.weight_giou:
        return "config.loss.weight_bbox and weight_giou are 0, so no query learns where its box is"
    return ""


def _more_objects_than_queries(run: Circumstances, rows: Rows) -> str:
    answers = {"model.num_queries": run.config.model.num_queries}
    answers |= {f"eval.{name}": run.config.eval[name] for name in ("max_detections", "max_detections_per_class")}
    field, fewest = min(answers.items(), key=lambda answer: answer[1])
    if fewest >= run.fullest:
        return ""
    unmatched = f", and {rows[-1]['surplus_boxes']:.3g} a step found no query" if rows[-1]["surplus_boxes"] else ""
    return f"an image has {run.fullest} objects, but config.{field} is {fewest}{unmatched}"


def _frozen_at_random(run: Circumstances, rows: Rows) -> str:
    if not run.untrained:
        return ""
    return "parts of the backbone are frozen and as random as they began, because no weights were loaded"


def _rate_far_too_low(run: Circumstances, rows: Rows) -> str:
    share = float(np.median([row["update_norm"] for row in rows])) / run.params_norm
    if share > FAR_TOO_LOW:
        return ""
    rate = max(row["lr"] for row in rows)
    return f"the learning rate, {rate:g} (config.optimizer.learning_rate), is far too low: {_steps(share, rows)}"


def _rate_far_too_high(run: Circumstances, rows: Rows) -> str:
    share, rate = max((row["update_norm"] / run.params_norm, row["lr"]) for row in rows)
    losses = _losses(rows)
    if share < TOO_HIGH or (share < FAR_TOO_HIGH and losses[-1] < FALLEN * losses[0]):
        return ""
    return f"the learning rate, {rate:g} (config.optimizer.learning_rate), is far too high: {_steps(share, rows)}"


def _boxes_below_a_cell(run: Circumstances, rows: Rows) -> str:
    if run.side > FAR_SMALLER * run.stride:
        return ""
    return (
        f"the boxes are far smaller than a cell of the finest map: half of them are below {run.side:.2g} pixels in the "
        f"image that the detector sees (config.data.eval_scale is {run.config.data.eval_scale}), and a cell has "
        f"{run.stride} (config.model.strides)"
    )


def _too_few_steps(run: Circumstances, rows: Rows) -> str:
    losses = _losses(rows)
    last = max(len(losses) // 3, 1)
    fallen = len(losses) > 1 and losses[-1] < losses[0]
    if fallen and losses[-last:].mean() < STILL_FALLING * losses[-2 * last : -last].mean():
        return f"it has not trained for long enough: its loss still falls, from {_fall(rows)}"
    return ""


REASONS: tuple[Callable[[Circumstances, Rows], str], ...] = (
    _weight_of_zero,
    _more_objects_than_queries,
    _frozen_at_random,
    _rate_far_too_low,
    _rate_far_too_high,
    _boxes_below_a_cell,
    _too_few_steps,
)


def _steps(share: float, rows: Rows) -> str:
    return f"a step changes the parameters by {100 * share:.2g} % of their size, and the loss went from {_fall(rows)}"


def _fall(rows: Rows) -> str:
    return f"{rows[0]['loss']:.4g} to {rows[-1]['loss']:.4g} in {rows[-1]['step']} steps"


def _losses(rows: Rows) -> Float[np.ndarray, " rows"]:
    return np.array([row["loss"] for row in rows])


def _sides(source: Source, config: ConfigDict) -> Float[np.ndarray, " targets"]:
    """Roots of the targets' areas as evaluation shows the images; `config` is config.data."""
    scale = np.sqrt(np.prod(evaluation_geometry(source.sizes, config).size / source.sizes, axis=1))
    image, boxes, _ = source.all_targets()
    return np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) * scale[image]

"""The set prediction loss: match queries with boxes, then train classes on all queries and boxes on matched ones."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.boxes import box_area, box_cxcywh_to_xyxy, box_iou, generalized_box_iou
from deperceiver_jax.errors import check_at_least, check_choice
from deperceiver_jax.losses.classification import Classification
from deperceiver_jax.losses.matcher import BACKENDS, match, matching_cost
from deperceiver_jax.structures import Assignment, Batch, Predictions


def set_loss(
    predictions: Predictions,
    batch: Batch,
    *,
    classification: Classification,
    config,
    mesh: Mesh,
    whole: Batch | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted total over all trained layers, and the unweighted terms by name. `config` is the whole config.

    Every decoder layer has its own matching and the same weights; `config.loss.auxiliary` False trains and matches the
    last layer alone. Terms: loss_ce (loss_focal, loss_iou_aware), loss_bbox and loss_giou of the last layer, the same
    with _0, _1, ... for the layers before it; a term of weight 0 is neither computed nor listed. For the record only:
    class_error and cardinality_error (last layer), num_boxes, surplus_boxes (boxes of the last layer that found no
    query).

    Sums run over the global batch, and `num_boxes` is its number of boxes, at least 1. DETR's W processes normalise by
    max(boxes / W, 1) and average gradients, which is sum / max(boxes, W): the same unless boxes are fewer than W. For
    the cross-entropy see SoftmaxNoObject.normalizer. Where `batch` is a part of a batch gone through in several parts,
    `whole` is that batch: it normalises in its place, so that losses and gradients of the parts add up to the whole's.
    Source: DETR's SetCriterion.

    Proposals of a two-stage detector are matched with all boxes as class slot 0 and trained with the same weights, as
    one more layer whose terms end in _enc; like these they need `config.loss.auxiliary`. Source: Deformable DETR.

    Denoising queries are trained in all layers to answer with the box that each was made of; their terms end in
    _denoising. They are normalised by the number of these queries, so as many copies weigh no more than one.
    """
    classification.check_width(predictions.logits.shape[-1], config.model.num_classes)
    proposals = predictions.proposals if config.loss.auxiliary else None
    denoising = predictions.denoising
    predictions = predictions._replace(proposals=None, denoising=None)
    if not config.loss.auxiliary:
        predictions = jax.tree.map(lambda array: array[-1:], predictions)
    whole_valid = (batch if whole is None else whole).box_valid
    shared = dict(classification=classification, config=config, mesh=mesh, whole_valid=whole_valid)
    weighted, assignment, target_labels = _layer_losses(predictions, batch, **shared)
    total = sum((weight * jnp.sum(layers) for weight, layers in weighted.values()), jnp.float32(0))
    terms = {name: layers[-1] for name, (_, layers) in weighted.items()}
    for layer in range(predictions.logits.shape[0] - 1):
        terms |= {f"{name}_{layer}": layers[layer] for name, (_, layers) in weighted.items()}
    if proposals is not None:
        any_object = batch._replace(labels=jnp.zeros_like(batch.labels))
        weighted, _, _ = _layer_losses(proposals, any_object, **shared)
        total += sum(weight * layers[0] for weight, layers in weighted.values())
        terms |= {f"{name}_enc": layers[0] for name, (_, layers) in weighted.items()}
    if denoising is not None:
        weighted = _denoising_losses(denoising, batch, **shared)
        total += sum(weight * jnp.sum(layers) for weight, layers in weighted.values())
        terms |= {f"{name}_denoising": layers[-1] for name, (_, layers) in weighted.items()}
    terms |= _error_terms(predictions.logits[-1], target_labels[-1], batch, classification)
    terms["num_boxes"] = _num_boxes(whole_valid)
    terms["surplus_boxes"] = jnp.sum(batch.box_valid & ~assignment.matched[-1], dtype=jnp.float32)
    return total, jax.lax.stop_gradient(terms)


def check_loss(config) -> None:
    """Raises UserError for weights from which no loss or no matching can be made. `config` is the whole config."""
    weights = [f"loss.weight_{part}" for part in ("class", "bbox", "giou")]
    weights += [f"matcher.cost_{part}" for part in ("class", "bbox", "giou")]
    for field in weights:
        section, name = field.split(".")
        check_at_least(f"config.{field}", config[section][name], 0)
    check_choice("config.matcher.backend", config.matcher.backend, BACKENDS)


def _num_boxes(whole_valid):
    return jnp.maximum(jnp.sum(whole_valid, dtype=jnp.float32), 1.0)


def _layer_losses(predictions: Predictions, batch: Batch, *, classification, config, mesh: Mesh, whole_valid):
    """{name: (weight, loss of each layer)} with the matching and the labels of queries that they were made from."""
    predictions = jax.tree.map(lambda array: array.astype(jnp.float32), predictions)
    cost = matching_cost(predictions, batch, classification, config.matcher)
    assignment = match(cost, batch.box_valid, backend=config.matcher.backend, mesh=mesh)
    target_labels = labels_of_queries(assignment, batch.labels, predictions.logits.shape[2])
    normalizer = classification.normalizer(whole_valid, predictions.logits.shape[2])
    asked = _asked(classification, predictions, batch, assignment)
    loss_class = functools.partial(classification.loss, predictions.logits, target_labels, normalizer, **asked)
    weighted = _weigh(config.loss, classification, loss_class, predictions, batch, assignment, _num_boxes(whole_valid))
    return weighted, assignment, target_labels


def _denoising_losses(predictions: Predictions, batch: Batch, *, classification, config, mesh, whole_valid):
    """{name: (weight, loss of each layer)} of queries whose boxes are known: nothing is matched.

    Query i answers for box slot i, copy after copy, in every layer; an empty slot's query is idle.
    """
    del mesh
    predictions = jax.tree.map(lambda array: array.astype(jnp.float32), predictions)
    copies = predictions.boxes.shape[2] // batch.boxes.shape[1]
    targets = jax.tree.map(lambda array: jnp.concatenate([array] * copies, axis=1), batch.targets)
    batch = batch._replace(**targets._asdict())
    matched = jnp.broadcast_to(batch.box_valid[None], (len(predictions.logits), *batch.box_valid.shape))
    slots = jnp.arange(matched.shape[2], dtype=jnp.int32)
    assignment = Assignment(jnp.where(matched, slots[None, None], 0), matched)
    target_labels = labels_of_queries(assignment, batch.labels, predictions.logits.shape[2])
    num_boxes = _num_boxes(jnp.concatenate([whole_valid] * copies, axis=1))
    asked = dict(counted=batch.box_valid, **_asked(classification, predictions, batch, assignment))
    loss_class = functools.partial(classification.loss, predictions.logits, target_labels, num_boxes, **asked)
    return _weigh(config.loss, classification, loss_class, predictions, batch, assignment, num_boxes)


def _weigh(weights, classification, loss_class, predictions: Predictions, batch: Batch, assignment, num_boxes):
    """{name: (weight, loss of each layer)}; a term of weight 0 is not computed. `weights` is config.loss."""
    of_boxes = (predictions.boxes, batch.boxes, assignment, num_boxes)
    terms = {
        f"loss_{classification.name}": (weights.weight_class, loss_class),
        "loss_bbox": (weights.weight_bbox, functools.partial(bbox_loss, *of_boxes)),
        "loss_giou": (weights.weight_giou, functools.partial(giou_loss, *of_boxes)),
    }
    return {name: (weight, loss()) for name, (weight, loss) in terms.items() if weight}


def _asked(classification: Classification, predictions: Predictions, batch: Batch, assignment: Assignment) -> dict:
    """What else the classification's loss asks for."""
    if not classification.asks_overlap:
        return {}
    return {"overlap": overlap_of_queries(predictions.boxes, batch.boxes, assignment)}


def overlap_of_queries(
    predicted: Float[Array, "L B Q 4"], target: Float[Array, "B N 4"], assignment: Assignment
) -> Float[Array, "L B Q"]:
    """IoU of each query's box with the one it answers for, both cxcywh; 0 without one, and where both have no area."""
    overlap = box_iou(box_cxcywh_to_xyxy(_boxes_of_slots(predicted, assignment)), box_cxcywh_to_xyxy(target)[None])
    known = _claims(assignment, predicted.shape[2]) & jnp.isfinite(overlap)[:, :, None]
    return jnp.max(jnp.where(known, overlap[:, :, None], 0.0), axis=-1, initial=0.0)


def labels_of_queries(assignment: Assignment, labels: Int32[Array, "B N"], num_queries: int) -> Int32[Array, "L B Q"]:
    """The class slot that each query shall predict, -1 for those without a box."""
    return jnp.max(jnp.where(_claims(assignment, num_queries), labels[None, :, None], -1), axis=-1, initial=-1)


def _claims(assignment: Assignment, num_queries: int) -> Bool[Array, "L B Q N"]:
    """Which query answers for which slot."""
    queries = jnp.arange(num_queries)[None, None, :, None]
    return assignment.matched[:, :, None] & (assignment.query[:, :, None] == queries)


def bbox_loss(
    predicted: Float[Array, "L B Q 4"], target: Float[Array, "B N 4"], assignment: Assignment, num_boxes
) -> Float[Array, " L"]:
    """L1 distance of matched boxes (cxcywh, four coordinates summed), divided by `num_boxes`."""
    distance = jnp.sum(jnp.abs(_boxes_of_slots(predicted, assignment) - target[None]), axis=-1)
    return jnp.sum(jnp.where(assignment.matched, distance, 0.0), axis=(1, 2)) / num_boxes


def giou_loss(
    predicted: Float[Array, "L B Q 4"], target: Float[Array, "B N 4"], assignment: Assignment, num_boxes
) -> Float[Array, " L"]:
    """1 - GIoU of matched boxes, divided by `num_boxes`.

    A matched pair in which neither box has an area is 0/0, NaN in DETR; here it counts as disjoint (GIoU -1) and pulls
    nowhere. Such pairs and empty slots are replaced before the division, so that no NaN reaches a gradient.
    """
    predicted = box_cxcywh_to_xyxy(_boxes_of_slots(predicted, assignment))
    target = jnp.broadcast_to(box_cxcywh_to_xyxy(target)[None], predicted.shape)
    sound = assignment.matched & (box_area(predicted) + box_area(target) > 0)
    whole = jnp.array([0.0, 0.0, 1.0, 1.0])[None, None, None]
    overlap = generalized_box_iou(
        jnp.where(sound[..., None], predicted, whole), jnp.where(sound[..., None], target, whole)
    )
    loss = 1.0 - jnp.where(sound, overlap, -1.0)
    return jnp.sum(jnp.where(assignment.matched, loss, 0.0), axis=(1, 2)) / num_boxes


def _boxes_of_slots(predicted, assignment: Assignment) -> Float[Array, "L B N 4"]:
    """The predicted box of each slot's query; query 0's where the slot is empty or unmatched."""
    return jnp.take_along_axis(predicted, assignment.query[..., None], axis=2)


def _error_terms(logits: Float[Array, "B Q C"], target_labels: Int32[Array, "B Q"], batch: Batch, classification):
    """What DETR logs of the last layer: wrong classes among matched queries (percent; 100 without any), and how far
    the number of queries that claim an object is from the number of boxes (means nothing without a no-object logit).
    """
    best = jnp.argmax(logits, axis=-1)
    num_matched = jnp.sum(target_labels >= 0)
    errors = {"class_error": 100.0 - 100.0 * jnp.sum(best == target_labels) / jnp.maximum(num_matched, 1)}
    if classification.has_no_object:
        num_claimed = jnp.sum(best != logits.shape[-1] - 1, axis=-1)
        difference = jnp.abs(num_claimed - jnp.sum(batch.box_valid, axis=-1))
        errors["cardinality_error"] = jnp.mean(difference.astype(jnp.float32))
    return errors

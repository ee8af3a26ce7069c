"""The set loss against DETR's and Deformable DETR's criterion, by hand, and on eight devices against one."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.losses.set_loss import giou_loss, labels_of_queries, overlap_of_queries, set_loss
from deperceiver_jax.sharding import ALL_DEVICES, make_mesh, shard_batch
from deperceiver_jax.structures import Assignment, Batch, Predictions

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def make_config(num_classes, *, focal=False, backend="scipy"):
    config = base()
    config.model = ConfigDict({"num_classes": num_classes})
    config.matcher.backend = backend
    if focal:
        config.loss.classification = "sigmoid_focal"
        config.loss.weight_class = config.matcher.cost_class = 2.0
    return config


def make_batch(boxes, labels, box_valid):
    num_images = len(boxes)
    size = np.full((num_images, 2), 8, np.int32)
    example = np.arange(num_images, dtype=np.int32)
    image = np.zeros((num_images, 8, 8, 3), np.uint8)
    boxes, labels = np.asarray(boxes, np.float32), np.asarray(labels, np.int32)
    return Batch(image, size, size, example, boxes, labels, np.asarray(box_valid, bool))


def make_loss(config):
    """set_loss and its gradients by the predictions, in NumPy: ((total, terms), Predictions of gradients)."""
    loss = compiled(config.to_json(), make_mesh(devices=jax.devices()[:1]))
    return lambda *arguments, **whole: jax.device_get(loss(*arguments, **whole))


@cache
def compiled(config, mesh):
    config = ConfigDict(json.loads(config))
    classification = build_classification(config.loss)
    loss = partial(set_loss, classification=classification, config=config, mesh=mesh)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def random_problem(rng, *, num_layers=3, num_images=8, num_queries=6, num_slots=8, num_logits=8):
    logits = rng.normal(size=(num_layers, num_images, num_queries, num_logits)) * 2
    boxes = rng.uniform(0.2, 0.8, size=(num_layers, num_images, num_queries, 4))
    predictions = Predictions(np.float32(logits), np.float32(boxes))
    counts = rng.integers(0, num_slots + 1, size=num_images)
    box_valid = np.arange(num_slots)[None] < counts[:, None]
    targets = rng.uniform(0.2, 0.8, size=(num_images, num_slots, 4)) * box_valid[..., None]
    labels = rng.integers(0, 7, size=(num_images, num_slots)) * box_valid
    return predictions, make_batch(targets, labels, box_valid)


def sheet_problem(num_logits):
    """Two images with four queries each: the golden case that the published criteria were asked about."""
    logits = np.zeros((1, 2, 4, num_logits), np.float32)
    logits[0, 0, 0, 3], logits[0, 0, 1, 17], logits[0, 1, 2, 1] = 2, 1, 3
    first = [(0.5, 0.5, 0.2, 0.2), (0.3, 0.6, 0.1, 0.1), (0.8, 0.8, 0.1, 0.3), (0.2, 0.2, 0.2, 0.2)]
    second = [(0.5, 0.5, 0.5, 0.5), (0.1, 0.1, 0.1, 0.1), (0.4, 0.4, 0.4, 0.6), (0.9, 0.9, 0.1, 0.1)]
    predictions = Predictions(logits, np.float32([[first, second]]))
    targets = [[(0.5, 0.5, 0.2, 0.3), (0.3, 0.5, 0.1, 0.1)], [(0.4, 0.4, 0.5, 0.5), (0, 0, 0, 0)]]
    return predictions, make_batch(targets, [[3, 17], [1, 0]], [[True, True], [True, False]])


@pytest.mark.parametrize(
    ("num_logits", "focal", "loss_class", "backend"),
    [
        (92, False, 2.885834, "scipy"),
        (92, False, 2.885834, "device"),
        (91, True, 31.410278, "scipy"),
        (92, True, 31.756849, "scipy"),
    ],
)
def test_golden_values(num_logits, focal, loss_class, backend):
    predictions, batch = sheet_problem(num_logits)
    config = make_config(91, focal=focal, backend=backend)
    (total, terms), _ = make_loss(config)(predictions, batch)
    expected = {
        "loss_focal" if focal else "loss_ce": loss_class,
        "loss_bbox": 0.133333,
        "loss_giou": 0.559004,
        "class_error": 0.0,
        "num_boxes": 3.0,
        "surplus_boxes": 0.0,
    }
    if not focal:
        expected["cardinality_error"] = 2.5
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-6, atol=1e-6, err_msg=name)
    weight_class = 2 if focal else 1
    np.testing.assert_allclose(total, weight_class * loss_class + 5 * 0.1333333 + 2 * 0.559004, rtol=3e-6)


@pytest.mark.parametrize(("name", "backend"), [("softmax", "scipy"), ("softmax", "device"), ("focal", "scipy")])
def test_equals_the_official_criterion(name, backend):
    """Three layers, an empty image, more boxes than queries, dead classes (focal): terms, total and gradients."""
    golden = np.load(GOLDEN / f"set_loss_{name}.npz")
    predictions = Predictions(golden["logits"], golden["boxes"])
    batch = make_batch(golden["target_boxes"], golden["target_labels"], golden["target_valid"])
    config = make_config(7, focal=name == "focal", backend=backend)
    (total, terms), gradients = make_loss(config)(predictions, batch)
    np.testing.assert_allclose(total, golden["total"], rtol=1e-6)
    official = {key.removeprefix("term_"): golden[key] for key in golden.files if key.startswith("term_")}
    assert official.keys() == terms.keys() - {"num_boxes", "surplus_boxes"}
    for term, value in official.items():
        np.testing.assert_allclose(terms[term], value, rtol=2e-6, atol=1e-6, err_msg=term)
    assert terms["num_boxes"] == 13 and terms["surplus_boxes"] == 2
    np.testing.assert_allclose(gradients.logits, golden["grad_logits"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients.boxes, golden["grad_boxes"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("focal", "backend", "model"), [(False, "scipy", 1), (False, "scipy", 2), (True, "device", 2)])
def test_eight_devices_equal_one(focal, backend, model):
    """Which SciPy has matched."""
    predictions, batch = random_problem(np.random.default_rng(1))
    (total, terms), gradients = make_loss(make_config(7, focal=focal))(predictions, batch)

    config = make_config(7, focal=focal, backend=backend)
    mesh = make_mesh(model)
    images_of_layers = NamedSharding(mesh, PartitionSpec(None, ALL_DEVICES))
    spread, on_devices = jax.device_put(predictions, images_of_layers), shard_batch(batch, mesh)
    program = compiled(config.to_json(), mesh).lower(spread, on_devices).compile()
    (total_8, terms_8), gradients_8 = jax.device_get(program(spread, on_devices))
    np.testing.assert_allclose(total_8, total, rtol=1e-6)
    assert terms_8.keys() == terms.keys()
    for name in terms:
        np.testing.assert_allclose(terms_8[name], terms[name], rtol=1e-6, err_msg=name)
    for one, eight in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_8), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-8)
    # Devices exchange sums alone: no device ever sees another's costs, boxes or logits.
    text = program.as_text()
    assert "all-reduce" in text
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in text, exchange


def test_layers_are_matched_on_their_own_and_named():
    predictions, batch = random_problem(np.random.default_rng(2))
    config = make_config(7)
    (total, terms), _ = make_loss(config)(predictions, batch)
    sum_of_layers = 0
    for layer, suffix in enumerate(("_0", "_1", "")):
        one = jax.tree.map(lambda array, layer=layer: array[layer : layer + 1], predictions)
        (total_of_layer, terms_of_layer), _ = make_loss(config)(one, batch)
        sum_of_layers += total_of_layer
        for name in ("loss_ce", "loss_bbox", "loss_giou"):
            np.testing.assert_allclose(terms[name + suffix], terms_of_layer[name], rtol=1e-6)
    np.testing.assert_allclose(total, sum_of_layers, rtol=1e-6)


def test_auxiliary_off_trains_the_last_layer_alone():
    predictions, batch = random_problem(np.random.default_rng(3))
    config = make_config(7)
    config.loss.auxiliary = False
    (total, terms), gradients = make_loss(config)(predictions, batch)
    assert not [name for name in terms if name.endswith(("_0", "_1"))]
    last = jax.tree.map(lambda array: array[-1:], predictions)
    config.loss.auxiliary = True
    (total_of_last, _), _ = make_loss(config)(last, batch)
    assert total == total_of_last
    for gradient in jax.tree.leaves(gradients):
        assert not gradient[:-1].any() and gradient[-1].any()


@pytest.mark.parametrize("focal", [False, True])
def test_parts_of_a_batch_add_up_to_the_whole(focal):
    predictions, batch = random_problem(np.random.default_rng(12))
    config = make_config(7, focal=focal)
    (total, terms), gradients = make_loss(config)(predictions, batch)
    sums, gradients_of_parts = {}, []
    for part in (slice(0, 4), slice(4, 8)):
        some = jax.tree.map(lambda array, part=part: array[:, part], predictions)
        (_, found), gradient = make_loss(config)(some, Batch(*(array[part] for array in batch)), whole=batch)
        assert found["num_boxes"] == terms["num_boxes"]
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        gradients_of_parts.append(gradient)
    for name, value in terms.items():
        if name.startswith(("loss", "surplus")):
            np.testing.assert_allclose(sums[name], value, rtol=2e-6, err_msg=name)
    joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *gradients_of_parts)
    for found, expected in zip(jax.tree.leaves(joined), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("off", "term"), [("class", "loss_ce"), ("bbox", "loss_bbox"), ("giou", "loss_giou")])
def test_a_term_of_weight_zero_is_left_out(off, term):
    predictions, batch = random_problem(np.random.default_rng(4))
    config = make_config(7)
    (total, terms), _ = make_loss(config)(predictions, batch)
    weight = config.loss[f"weight_{off}"]
    config.loss[f"weight_{off}"] = 0.0
    (total_without, terms_without), _ = make_loss(config)(predictions, batch)
    assert terms_without.keys() == terms.keys() - {term, f"{term}_0", f"{term}_1"}
    of_all_layers = sum(terms[term + suffix] for suffix in ("_0", "_1", ""))
    np.testing.assert_allclose(total_without, total - weight * of_all_layers, rtol=1e-5)


@pytest.mark.parametrize("focal", [False, True])
def test_batch_without_any_box(focal):
    predictions, batch = random_problem(np.random.default_rng(5))
    batch = batch._replace(box_valid=np.zeros_like(batch.box_valid))
    (total, terms), gradients = make_loss(make_config(7, focal=focal))(predictions, batch)
    assert np.isfinite(total) and total > 0
    assert terms["num_boxes"] == 1 and terms["loss_bbox"] == 0 and terms["loss_giou"] == 0
    assert terms["class_error"] == 100  # as DETR reports it
    assert np.isfinite(gradients.logits).all() and gradients.logits.any()
    assert not gradients.boxes.any()


def test_batch_without_any_slot():
    predictions, batch = random_problem(np.random.default_rng(6), num_slots=0)
    (total, terms), _ = make_loss(make_config(7))(predictions, batch)
    assert np.isfinite(total) and terms["num_boxes"] == 1


def test_boxes_without_area_give_no_nan():
    """Padded slots are points, and so may be predictions: even a matched pair of points must not spoil the step."""
    predictions, batch = random_problem(np.random.default_rng(7))
    points = predictions.boxes.copy()
    points[:, :, :2, 2:] = points[0, 1] = 0.0
    targets = batch.boxes.copy()
    targets[0, 0] = (0.5, 0.5, 0.0, 0.0)
    targets[1] = 0.0
    box_valid = batch.box_valid.copy()
    box_valid[:2, 0] = True
    batch = batch._replace(boxes=targets, box_valid=box_valid)
    (total, terms), gradients = make_loss(make_config(7))(Predictions(predictions.logits, points), batch)
    assert np.isfinite(total) and all(np.isfinite(value) for value in terms.values())
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()


def test_pairs_without_area_count_as_disjoint():
    predicted = np.float32([[[[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]]]])
    target = np.float32([[[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    assignment = Assignment(np.int32([[[0, 1, 0]]]), np.array([[[True, True, False]]]))
    program = jax.jit(jax.value_and_grad(lambda p: giou_loss(p, target, assignment, 1.0)[0]))
    loss, gradient = jax.device_get(program(predicted))
    assert loss == 2.0
    assert np.isfinite(gradient).all() and not gradient[0, 0, 0].any()


def test_labels_of_queries():
    assignment = Assignment(np.int32([[[2, 0, 0]], [[1, 3, 0]]]), np.array([[[True, True, False]], [[True] * 3]]))
    found = jax.jit(labels_of_queries, static_argnums=2)(assignment, np.int32([[7, 0, 5]]), 4)
    np.testing.assert_array_equal(found, [[[0, -1, 7, -1]], [[5, 7, -1, 0]]])


def test_overlaps_of_queries():
    """Of two layers' matched queries; a slot that is empty, one without a query, and two boxes without an area."""
    target = np.float32([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.0, 0.0], [0.8, 0.8, 0.1, 0.1]]])
    predicted = np.float32([[[0.5, 0.5, 0.2, 0.1], [0.3, 0.3, 0.0, 0.0], [0.55, 0.5, 0.2, 0.2]]])
    query = np.int32([[[0, 1, 0]], [[2, 0, 0]]])
    matched = np.array([[[True, True, False]], [[True, False, False]]])
    found = jax.jit(overlap_of_queries)(np.stack([predicted, predicted]), target, Assignment(query, matched))
    np.testing.assert_allclose(found, [[[0.5, 0, 0]], [[0, 0, 0.6]]], rtol=1e-5)


def test_an_iou_aware_score_is_asked_for_where_the_box_lies():
    """By the term of every layer, of proposals and of denoising queries; gradients of boxes are the other terms'."""
    config = make_config(7)
    config.loss.classification = "sigmoid_iou_aware"
    config.loss.weight_bbox = config.loss.weight_giou = 0.0
    rng = np.random.default_rng(5)
    predictions, batch = random_problem(rng, num_images=2, num_queries=8, num_logits=7)
    proposals = Predictions(*(x[:1] for x in predictions[:2]))
    targets = np.broadcast_to(batch.boxes, (3, *batch.boxes.shape))
    exact, far = (predictions._replace(boxes=boxes) for boxes in (targets, np.full_like(targets, 0.01)))
    found = {}
    for name, denoising in (("exact", exact), ("far", far)):
        all_of = predictions._replace(proposals=proposals, denoising=denoising)
        (_, found[name]), gradient = make_loss(config)(all_of, batch)
        assert all(not x.any() for x in (gradient.boxes, gradient.proposals.boxes, gradient.denoising.boxes))
        assert all(x.any() for x in (gradient.logits, gradient.proposals.logits, gradient.denoising.logits))
    same = {name for name in found["far"] if found["far"][name] == found["exact"][name]}
    assert {"loss_iou_aware", "loss_iou_aware_0", "loss_iou_aware_enc"} <= same
    assert "loss_iou_aware_denoising" in found["far"].keys() - same


def test_bfloat16_predictions_give_float32_losses():
    predictions, batch = random_problem(np.random.default_rng(8))
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), predictions)
    (total, terms), gradients = make_loss(make_config(7))(half, batch)
    wide = jax.tree.map(lambda array: array.astype(np.float32), half)
    (total_of_wide, _), _ = make_loss(make_config(7))(wide, batch)
    assert total.dtype == jnp.float32 and all(value.dtype == jnp.float32 for value in terms.values())
    assert gradients.boxes.dtype == jnp.bfloat16
    np.testing.assert_allclose(total, total_of_wide, rtol=1e-6)


def test_a_missing_no_object_logit_is_a_sentence():
    predictions, batch = random_problem(np.random.default_rng(9))
    with pytest.raises(UserError, match="needs 9 logits, one more than the 8 classes, but the model has 8"):
        make_loss(make_config(8))(predictions, batch)


def test_proposals_are_one_more_layer_of_a_single_class():
    """Its terms are those of an ordinary layer whose boxes are all of class slot 0; without auxiliary losses, none."""
    predictions, batch = random_problem(np.random.default_rng(9))
    layer = jax.tree.map(lambda array: array[:1], predictions)
    config = make_config(7, focal=True)
    loss = make_loss(config)
    (alone, expected), expected_gradient = loss(layer, batch._replace(labels=np.zeros_like(batch.labels)))
    (without, terms_without), _ = loss(predictions, batch)
    (total, terms), gradient = loss(predictions._replace(proposals=layer), batch)
    np.testing.assert_allclose(total, without + alone, rtol=1e-6)
    for name in ("loss_focal", "loss_bbox", "loss_giou"):
        np.testing.assert_allclose(terms[f"{name}_enc"], expected[name], rtol=1e-6)
    assert set(terms) - set(terms_without) == {"loss_focal_enc", "loss_bbox_enc", "loss_giou_enc"}
    for ours, theirs in zip(jax.tree.leaves(gradient.proposals), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    config.loss.auxiliary = False
    (_, terms), gradient = make_loss(config)(predictions._replace(proposals=layer), batch)
    assert not any(name.endswith("_enc") for name in terms)
    assert not any(x.any() for x in jax.tree.leaves(gradient.proposals))


@pytest.mark.parametrize("focal", [True, False])
def test_a_denoising_query_answers_for_its_own_box(focal):
    """Its terms are those of queries that lie on their boxes in order; empty slots are idle."""
    config = make_config(3, focal=focal)
    boxes = [[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.4], [0.0] * 4]
    batch = make_batch([boxes], [[1, 0, 0]], [[True, True, False]])
    width = 3 if focal else 4
    logits = np.random.default_rng(0).normal(size=(2, 1, 6, width)).astype(np.float32)
    shifted = np.float32([boxes, boxes]).reshape(1, 1, 6, 4) + np.float32(0.02)  # four numbers of 0.02 each
    answers = Predictions(np.zeros((1, 1, 2, width), np.float32), np.full((1, 1, 2, 4), 0.5, np.float32))
    denoising = Predictions(logits, np.concatenate([shifted, shifted], axis=0))
    (alone, _), _ = make_loss(config)(answers, batch)
    (total, terms), gradient = make_loss(config)(answers._replace(denoising=denoising), batch)
    np.testing.assert_allclose(terms["loss_bbox_denoising"], 0.08, rtol=1e-5)
    for field in gradient.denoising:
        if field is not None:
            assert np.all(np.any(field, axis=(0, 1, 3)) == [True, True, False] * 2)
    # Two real queries of each copy, each of its own class: half of the sum over the four.
    classification = build_classification(config.loss)
    labels = np.int32([[[1, 0, 1, 0]]] * 2)
    expected = np.asarray(jax.jit(classification.loss)(logits[:, :, [0, 1, 3, 4]], labels, np.float32(4.0)))
    name = classification.name
    np.testing.assert_allclose(terms[f"loss_{name}_denoising"], expected[-1], rtol=1e-5)
    weights = (config.loss.weight_class, config.loss.weight_bbox, config.loss.weight_giou)
    layers = (expected.sum(), 2 * terms["loss_bbox_denoising"], 2 * terms["loss_giou_denoising"])
    np.testing.assert_allclose(total - alone, sum(w * x for w, x in zip(weights, layers, strict=True)), rtol=1e-4)

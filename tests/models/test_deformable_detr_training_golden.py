"""Losses, matching and gradients of Deformable DETR at full size are the official ones; see golden/README.md."""

import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.deformable_detr import get_config
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.losses.matcher import hungarian_assignment, matching_cost
from deperceiver_jax.losses.set_loss import set_loss
from deperceiver_jax.models import build_detector
from deperceiver_jax.models.resnet import Frozen
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Batch
from deperceiver_jax.weights import FAMILIES, load_torch_state, torch_shapes
from deperceiver_jax.weights.name_rules import to_torch
from deperceiver_jax.weights.seeded import seeded_array

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "deformable_training.npz")
SIZES = ((97, 131), (113, 90))
MAX_BOXES = 5


def images():
    rng = np.random.default_rng(7)
    frame = np.max(SIZES, axis=0)
    image, valid = np.zeros((2, *frame, 3), np.float32), np.zeros((2, *frame), bool)
    for b, (height, width) in enumerate(SIZES):
        image[b, :height, :width] = rng.standard_normal((height, width, 3), np.float32)
        valid[b, :height, :width] = True
    return image, valid


def targets():
    """Five boxes and three, as the official side drew them."""
    rng = np.random.default_rng(11)
    boxes, labels = np.zeros((2, MAX_BOXES, 4), np.float32), np.zeros((2, MAX_BOXES), np.int32)
    for b, n in enumerate((5, 3)):
        size = rng.uniform(0.1, 0.5, (n, 2))
        center = size / 2 + rng.uniform(0, 1, (n, 2)) * (1 - size)
        boxes[b, :n] = np.concatenate([center, size], axis=1)
        labels[b, :n] = rng.integers(1, 91, n)
    sizes, example = np.asarray(SIZES, np.int32), np.arange(2, dtype=np.int32)
    box_valid = np.arange(MAX_BOXES)[None] < np.array([[5], [3]])
    return Batch(np.zeros((2, 1, 1, 3), np.uint8), sizes, sizes, example, boxes, labels, box_valid)


def sample(name, array):
    """Sixteen entries of an array in official layout, drawn by its name."""
    return np.asarray(array).reshape(-1)[np.random.default_rng(zlib.crc32(name.encode())).integers(0, array.size, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["r50", "r50_two_stage"])
def test_terms_matching_and_gradients(variant):
    config = get_config(variant)
    config.model.dropout = 0.0
    if config.model.two_stage:
        config.model.num_queries = 100
    classification, mesh = build_classification(config.loss), make_mesh(devices=jax.devices()[:1])
    rules = FAMILIES["deformable_detr"](config.model)
    detector = nnx.eval_shape(lambda: build_detector(config, rngs=nnx.Rngs(0)))
    seeds = {name: 175 if name.startswith("class_embed.6.") else 0 for name in torch_shapes(detector, rules)}
    state = {name: seeded_array(name, shape, seeds[name]) for name, shape in torch_shapes(detector, rules).items()}
    load_torch_state(detector, state, rules)
    graphdef, trained, frozen = nnx.split(detector, nnx.Param, Frozen)

    def loss(trained, frozen, image, valid, batch):
        predictions = nnx.merge(graphdef, trained, frozen)(image, valid)
        total, terms = set_loss(predictions, batch, classification=classification, config=config, mesh=mesh)
        cost = [matching_cost(predictions, batch, classification, config.matcher)]
        if predictions.proposals is not None:
            any_object = batch._replace(labels=jnp.zeros_like(batch.labels))
            cost.append(matching_cost(predictions.proposals, any_object, classification, config.matcher))
        return total, (terms, cost)

    batch = targets()
    gradient, (terms, costs) = jax.jit(jax.grad(loss, has_aux=True))(trained, frozen, *images(), batch)

    names = GOLDEN[f"{variant}/term_names"].tolist()
    found = np.array([float(terms[name.replace("loss_ce", "loss_focal")]) for name in names])
    np.testing.assert_allclose(found, GOLDEN[f"{variant}/terms"], rtol=1e-5)

    query = []
    for cost in costs:
        assignment = hungarian_assignment(np.asarray(cost), batch.box_valid)
        query.append(np.where(assignment.matched, assignment.query, -1))
    np.testing.assert_array_equal(np.concatenate(query), GOLDEN[f"{variant}/query"])

    arrays = {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(gradient)}
    theirs = to_torch(arrays, rules)
    names = GOLDEN[f"{variant}/parameter_names"].tolist()
    assert sorted(theirs) == names
    wrong = {}
    for i, name in enumerate(names):
        norm = float(GOLDEN[f"{variant}/norms"][i])
        noise = float(GOLDEN[f"{variant}/noise"][i]) * math.sqrt(theirs[name].size)
        limit = max(1e-3, 3 * noise / norm)  # or three times the official float32's distance from its own float64
        of_norm = abs(np.linalg.norm(theirs[name].astype(np.float64)) / norm - 1)
        difference = sample(name, theirs[name]).astype(np.float64) - GOLDEN[f"{variant}/samples"][i]
        of_samples = math.sqrt(np.mean(difference**2) * theirs[name].size) / norm
        if not max(of_norm, of_samples) < limit:
            wrong[name] = (of_norm, of_samples, limit)
    assert not wrong

"""Deformable DETR at full size gives what the official code gives, in every decoder layer; see golden/README.md."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs.deformable_detr import get_config
from deperceiver_jax.weights.name_rules import torch_shapes, with_copies
from deperceiver_jax.weights.tables import FAMILIES
from tests.drawn_arrays import abstract_detector
from tests.seeded import seeded_array
from tests.torch_state import load_torch_state

pytestmark = pytest.mark.slow

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "deformable_forward.npz")
SIZES = ((97, 131), (113, 90))  # (height, width) of the two images; neither reaches both edges of the padded frame
NUM_KEYS = {  # of the official state dicts
    "r50_single_scale": 549,
    "r50_single_scale_dc5": 549,
    "r50": 561,
    "r50_refine": 597,
    "r50_two_stage": 630,
}


def images():
    """Two images of different sizes in one frame, as the official side made them."""
    rng = np.random.default_rng(7)
    frame = np.max(SIZES, axis=0)
    image, valid = np.zeros((2, *frame, 3), np.float32), np.zeros((2, *frame), bool)
    for b, (height, width) in enumerate(SIZES):
        image[b, :height, :width] = rng.standard_normal((height, width, 3), np.float32)
        valid[b, :height, :width] = True
    return image, valid


@pytest.fixture(scope="module")
def seeded():
    """Draws arrays that the variants share once.

    The proposals' class head has a seed of its own, with which no two of the best scores are close.
    """
    return functools.cache(
        lambda name, shape: seeded_array(name, shape, 175 if name.startswith("class_embed.6.") else 0)
    )


@pytest.mark.parametrize("variant", NUM_KEYS)
def test_logits_and_boxes_are_the_official_ones(variant, seeded):
    config = get_config(variant)
    if config.model.two_stage:
        config.model.num_queries = 100
    rules = FAMILIES["deformable_detr"](config.model)
    detector = abstract_detector(config)
    state = with_copies({name: seeded(name, shape) for name, shape in torch_shapes(detector, rules).items()}, rules)
    assert len(state) == NUM_KEYS[variant]
    load_torch_state(detector, state, rules)

    graphdef, arrays = nnx.split(detector)
    predictions = jax.jit(lambda arrays, *args: nnx.merge(graphdef, arrays)(*args))(arrays, *images())
    logits, boxes = np.asarray(predictions.logits), np.asarray(predictions.boxes)
    assert logits.shape == (6, 2, config.model.num_queries, 91)
    stride = config.model.num_queries // GOLDEN[f"{variant}/logits"].shape[2]
    noise = GOLDEN[f"{variant}/noise"]
    assert noise.max() < 3e-5  # what the official float32 is from its own float64; 1e-4 is the promise
    np.testing.assert_allclose(logits[:, :, ::stride, ::3], GOLDEN[f"{variant}/logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(boxes[:, :, ::5], GOLDEN[f"{variant}/boxes"], rtol=0, atol=2e-5)
    if not config.model.two_stage:
        assert predictions.proposals is None
        return
    proposals = jax.tree.map(np.asarray, predictions.proposals)
    np.testing.assert_allclose(proposals.logits[0, :, ::7, ::9], GOLDEN[f"{variant}/enc_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(proposals.boxes[0, :, ::7], GOLDEN[f"{variant}/enc_boxes"], rtol=0, atol=2e-5)
    best = np.argsort(-proposals.logits[0, :, :, 0], stable=True)[:, :100]
    np.testing.assert_array_equal(best, GOLDEN[f"{variant}/top"])

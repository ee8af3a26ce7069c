"""DePerceiver at full size gives what the official code gives, in every decoder layer; see golden/README.md."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs.deperceiver import get_config
from deperceiver_jax.weights.name_rules import torch_shapes
from deperceiver_jax.weights.tables import FAMILIES
from tests.drawn_arrays import abstract_detector
from tests.seeded import seeded_array
from tests.torch_state import load_torch_state

pytestmark = pytest.mark.slow

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "deperceiver_forward.npz")
SIZES = ((97, 131), (113, 90))  # (height, width) of the two images; neither reaches both edges of the padded frame
TOLERANCE = 2e-5  # the official code's float32 is up to 4e-6 from its own float64; what depends on the image is 1e-2

# variant of the config, keys in its official state dict without the loss's buffer, what differs from the config
VARIANTS = {
    "r50_32": ("r50_32", 409, {}),
    "r50_16": ("r50_16", 359, {}),
    "r50_8": ("r50_8", 264, {}),
    "r50_4": ("r50_4", 199, {}),
    "r50_multiscale": ("r50_multiscale", 416, {}),
    "r50_32_auxiliary": ("r50_32", 477, {"num_layers": 3, "self_attention": True, "final_norm": True, "dropout": 0.1}),
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
    """Draws arrays that the variants share once."""
    return functools.cache(seeded_array)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_boxes_are_the_official_ones(name, seeded):
    variant, num_keys, changes = VARIANTS[name]
    config = get_config(variant)
    config.model.encoder.num_latents = 1024  # the official code's default
    config.model.decoder.update(changes)
    rules = FAMILIES["deperceiver"](config.model)
    detector = abstract_detector(config)
    state = {name: seeded(name, shape) for name, shape in torch_shapes(detector, rules).items()}
    assert len(state) == num_keys
    load_torch_state(detector, state, rules)

    graphdef, arrays = nnx.split(detector)
    predictions = jax.jit(lambda arrays, *args: nnx.merge(graphdef, arrays)(*args))(arrays, *images())
    logits, boxes = np.asarray(predictions.logits), np.asarray(predictions.boxes)
    assert logits.shape == (changes.get("num_layers", 1), 2, 100, 92)
    np.testing.assert_allclose(logits[:, :, ::5], GOLDEN[f"{name}/logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(boxes, GOLDEN[f"{name}/boxes"], rtol=0, atol=TOLERANCE)

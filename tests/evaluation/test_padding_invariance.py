"""The same image in another size bucket and batch gets the same boxes, within what convolutions let through.

Group norm, which trains from scratch, keeps padding out between layers: what differs is rounding. Frozen batch norm
does not, as in the released ResNets: what a convolution carries from the image into the padding, the next one carries
back, up to where the frame ends. The tolerances are stated for parameters at their initial values.
"""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.deperceiver import get_config
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models import build_detector

SIZES = {"a": (100, 140), "b": (140, 150)}
# norm -> (largest difference of logits, of boxes as shares of the image); measured 1.0e-7, 6e-8 and 1.5e-3, 1.0e-4.
# Between the two images they differ by 5e-3 and 2e-4, and by 1.3e-2 and 6e-4: new parameters tell little apart.
TOLERANCE = {"group_norm": (1e-6, 1e-6), "frozen_batch_norm": (3e-3, 2e-4)}


def batch_of(names, frame):
    images = np.zeros((len(names), *frame, 3), np.uint8)
    for i, name in enumerate(names):
        height, width = SIZES[name]
        coarse = np.random.default_rng(ord(name)).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        images[i, :height, :width] = cv2.resize(coarse, (width, height))
    return normalize_images(jnp.asarray(images), jnp.array([SIZES[name] for name in names], jnp.int32))


@pytest.mark.parametrize("norm", TOLERANCE)
def test_bucket_and_batch_do_not_matter(norm):
    config = get_config("r50_16")
    config.model.backbone.update(depth=18, width=16, norm=norm, frozen_stages=0)
    config.model.update(embed_dim=64, num_queries=10, num_classes=3)
    config.model.encoder.update(num_latents=32, latent_dim=64, num_blocks=1, layers_per_block=2, self_heads=4)
    detector = build_detector(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(detector)
    run = jax.jit(lambda state, *batch: nnx.merge(graphdef, state)(*batch))

    def answer(names, frame, name):
        predictions = run(state, *batch_of(names, frame))
        return [np.asarray(x[-1, names.index(name)]) for x in predictions]

    alone = answer(["a"], (128, 160), "a")
    together = answer(["b", "a"], (256, 320), "a")
    for here, there, tolerance in zip(alone, together, TOLERANCE[norm], strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=tolerance)
    other = answer(["b", "a"], (256, 320), "b")
    for here, there, tolerance in zip(alone, other, TOLERANCE[norm], strict=True):
        assert np.abs(here - there).max() > tolerance

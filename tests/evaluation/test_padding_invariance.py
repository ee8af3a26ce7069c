"""The same image in another size bucket and batch gets the same boxes, within what convolutions let through.

Group norm, which trains from scratch, keeps padding out between layers: what differs is rounding. Frozen batch norm
does not, as in the released ResNets: what a convolution carries from the image into the padding, the next one carries
back, so it matters a little where the frame ends, until that is out of reach.
"""

import cv2
import jax
import numpy as np
import pytest

from configs.deperceiver import get_config
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models.skeleton import take_apart
from tests.drawn_arrays import abstract_detector

SIZES = {"a": (100, 140), "b": (140, 150)}
# Largest difference of logits and of boxes, as shares of the image. Measured 3e-6 and 4e-7 where only rounding differs;
# 0.09 and 0.007 between an end of the frame that is near and one that is far; 0.5 and 0.04 between the two images.
ROUNDING = (3e-5, 3e-6)
NEAR_END = {"group_norm": ROUNDING, "frozen_batch_norm": (0.15, 0.012)}
OTHER_IMAGE = (0.3, 0.03)


def batch_of(names, frame):
    images = np.zeros((len(names), *frame, 3), np.uint8)
    for i, name in enumerate(names):
        height, width = SIZES[name]
        coarse = np.random.default_rng(ord(name)).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        images[i, :height, :width] = cv2.resize(coarse, (width, height))
    return images, np.int32([SIZES[name] for name in names])


@pytest.mark.parametrize("norm", NEAR_END)
def test_bucket_and_batch_do_not_matter(norm, random_arrays):
    config = get_config("r50_16")
    config.model.backbone.update(depth=18, width=16, norm=norm, frozen_stages=0)
    config.model.update(embed_dim=64, num_queries=10, num_classes=3)
    config.model.encoder.update(num_latents=32, latent_dim=64, num_blocks=1, layers_per_block=2, self_heads=4)
    skeleton, params, others = take_apart(abstract_detector(config))
    arrays = random_arrays({**params, **others})
    run = jax.jit(lambda arrays, *batch: skeleton.merge(arrays)(*normalize_images(*batch)))

    def answer(names, frame, name):
        predictions = run(arrays, *batch_of(names, frame))
        return [np.asarray(x[-1, names.index(name)]) for x in (predictions.logits, predictions.boxes)]

    near, far = answer(["a"], (128, 160), "a"), answer(["b", "a"], (256, 320), "a")
    farther, other = answer(["a"], (320, 352), "a"), answer(["b", "a"], (256, 320), "b")
    for k in range(2):
        np.testing.assert_allclose(farther[k], far[k], rtol=0, atol=ROUNDING[k])
        np.testing.assert_allclose(near[k], far[k], rtol=0, atol=NEAR_END[norm][k])
        assert np.abs(other[k] - far[k]).max() > OTHER_IMAGE[k]

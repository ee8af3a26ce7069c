"""Boxes with noise, from which a detector in training learns to find the right ones without a matching.

Source: Li et al., "DN-DETR" (arXiv:2203.01305), section 4.2; the noise of sizes is logarithmic here.
"""

import jax
import jax.numpy as jnp

from deperceiver_jax.errors import UserError
from deperceiver_jax.structures import Batch, Hints


def make_hints(batch: Batch, config_loss, key: jax.Array) -> Hints | None:
    """`config.loss.hint_copies` wrong copies of each box, or None where that is 0.

    A centre moves by at most `config.loss.hint_noise` of the box's width and height, uniformly, and these grow or
    shrink by a factor of at most exp(hint_noise). Boxes are not clipped to the image.
    """
    copies, noise = config_loss.hint_copies, config_loss.hint_noise
    if copies < 0 or noise < 0:
        raise UserError(f"config.loss.hint_copies is {copies} and hint_noise {noise}; neither may be below 0.")
    if copies == 0:
        return None
    shape = (batch.boxes.shape[0], copies, *batch.boxes.shape[1:])
    center, size = jnp.split(jnp.broadcast_to(batch.boxes[:, None], shape), 2, axis=-1)
    shift, growth = jnp.split(jax.random.uniform(key, shape, minval=-noise, maxval=noise), 2, axis=-1)
    boxes = jnp.concatenate([center + shift * size, size * jnp.exp(growth)], axis=-1)
    valid = jnp.broadcast_to(batch.box_valid[:, None], shape[:-1])
    return Hints(jnp.where(valid[..., None], boxes, 0.5), valid)

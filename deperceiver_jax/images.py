"""What happens to pixels on the device: uint8 -> normalised floats, and which of them are real."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(
    image: UInt8[Array, "B H W 3"], size: Int32[Array, "B 2"]
) -> tuple[Float[Array, "B H W 3"], Bool[Array, "B H W"]]:
    """Removes ImageNet's mean and standard deviation; padding becomes 0 after that, as in DETR.

    Returns (image float32, pixel_valid), the two arguments of every detector.
    """
    height, width = image.shape[1:3]
    rows = jnp.arange(height)[None, :, None] < size[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < size[:, 1, None, None]
    pixel_valid = rows & columns
    mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = (image.astype(jnp.float32) / 255.0 - mean) / std
    return jnp.where(pixel_valid[..., None], normalized, 0.0), pixel_valid

"""From feature maps to tokens: which of them are real, and their row-major order."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def feature_valid(pixel_valid: Bool[Array, "B H W"], height: int, width: int) -> Bool[Array, "B h w"]:
    """`pixel_valid` at the size of a feature map, by DETR's nearest rule: cell i looks at pixel floor(i * in / out).

    Cell (0, 0) always looks at pixel (0, 0), so no image is without a valid cell. The half-pixel rule of
    `jax.image.resize` gives another mask.
    """

    def source(size_in: int, size_out: int) -> np.ndarray:
        scale = np.float32(size_in / size_out)
        return np.minimum(np.floor(np.arange(size_out, dtype=np.float32) * scale).astype(np.int32), size_in - 1)

    rows, columns = source(pixel_valid.shape[1], height), source(pixel_valid.shape[2], width)
    return pixel_valid[:, rows][:, :, columns]


def flatten_map(features: Float[Array, "B h w C"]) -> Float[Array, "B h*w C"]:
    """Tokens in row-major order."""
    return features.reshape(features.shape[0], -1, features.shape[-1])


def concatenate_levels(levels: list) -> Array:
    """Tokens of several maps, one after the other."""
    return levels[0] if len(levels) == 1 else jnp.concatenate(levels, axis=1)

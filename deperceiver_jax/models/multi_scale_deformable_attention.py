"""Multi-scale deformable attention: a query looks at a few points of each feature map, wherever it wants them.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), equation 3. No compiled operator: the points are read with
gathers, so it differentiates, runs in bfloat16 and exports like any other part of a model.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.linear import linear, xavier_uniform_init


def sample_levels(
    value: Float[Array, "B S H D"],
    level_sizes: Sequence[tuple[int, int]],
    location: Float[Array, "B Q H L K 2"],
    weight: Float[Array, "B Q H L K"],
) -> Float[Array, "B Q H D"]:
    """Sum over levels and points of weight * value at location: bilinear, and zero outside of a map.

    `value` holds the maps of `level_sizes` (height, width) one after the other, each row by row; head h reads its own
    channels value[:, :, h]. `location` is (x, y) of the padded map, 0 and 1 at its outer edges, so that the centre of
    cell i is (i + 0.5) / size. Locations and weights count in float32, the sum is in float32, the result has the type
    of `value`. This is grid_sample with align_corners False and zero padding.
    """
    batch, _, num_heads, channels = value.shape
    num_queries = location.shape[1]
    by_head = value.transpose(0, 2, 1, 3)
    location = location.astype(jnp.float32).transpose(0, 2, 3, 1, 4, 5)  # B H L Q K 2
    weight = weight.astype(jnp.float32).transpose(0, 2, 3, 1, 4)
    total, start = jnp.zeros((batch, num_heads, num_queries, channels), jnp.float32), 0
    for level, (height, width) in enumerate(level_sizes):
        cells = by_head[:, :, start : start + height * width]
        total += _sample_level(cells, location[:, :, level], weight[:, :, level], (height, width))
        start += height * width
    return total.transpose(0, 2, 1, 3).astype(value.dtype)


@functools.partial(jax.checkpoint, static_argnums=(3,))
def _sample_level(
    cells: Float[Array, "B H h*w D"],
    location: Float[Array, "B H Q K 2"],
    weight: Float[Array, "B H Q K"],
    size: tuple[int, int],
) -> Float[Array, "B H Q D"]:
    """One level of `sample_levels`, in float32.

    What it reads is read again for the gradient: keeping it would take 1.2 GB for each encoder layer of an 800 x 1066
    image.
    """
    batch, num_heads, num_queries, num_points, _ = location.shape
    height, width = size
    # Beyond one cell outside everything is zero; the clip keeps far locations from overflowing an integer.
    x = jnp.clip(location[..., 0] * width - 0.5, -1.0, width)
    y = jnp.clip(location[..., 1] * height - 0.5, -1.0, height)
    left, top = jnp.floor(x), jnp.floor(y)
    right_share, bottom_share = x - left, y - top
    total = 0.0
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = jnp.where(inside, row.astype(jnp.int32) * width + column.astype(jnp.int32), 0)
            corner = jnp.take_along_axis(cells, index.reshape(batch, num_heads, -1, 1), axis=2, mode="clip")
            corner = corner.reshape(batch, num_heads, num_queries, num_points, -1).astype(jnp.float32)
            share = jnp.where(inside, row_share * column_share, 0.0) * weight
            total += jnp.sum(share[..., None] * corner, axis=3)
    return total


class MultiScaleDeformableAttention(nnx.Module):
    """Each query reads `num_points` points of every level for every head, at learned offsets from its reference.

    Offsets start as a star: head h looks along its own direction, point k at k steps of it; all points weigh alike.
    """

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int, dtype, rngs: nnx.Rngs):
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"{num_heads} heads do not divide a deformable attention of width {dim}.")
        if num_points < 1:
            raise UserError(f"A deformable attention with {num_points} points looks nowhere; num_points is at least 1.")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        zeros = nnx.initializers.zeros
        points = num_heads * num_levels * num_points
        xavier = dict(kernel_init=xavier_uniform_init(dim, dim), bias_init=zeros, dtype=dtype, rngs=rngs)
        self.value = linear(dim, dim, **xavier)
        self.out = linear(dim, dim, **xavier)
        # Where to look and how much is decided in float32: a bfloat16 offset would be coarser than a cell.
        exact = dict(kernel_init=zeros, dtype=jnp.float32, rngs=rngs)
        self.sampling_offsets = linear(dim, 2 * points, bias_init=self._star, **exact)
        self.attention_weights = linear(dim, points, bias_init=zeros, **exact)

    def _star(self, key, shape, dtype=jnp.float32, out_sharding=None):
        del key, out_sharding
        angle = np.arange(self.num_heads, dtype=np.float32) * np.float32(2 * math.pi / self.num_heads)
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        direction /= np.abs(direction).max(axis=-1, keepdims=True)
        steps = np.arange(1, self.num_points + 1, dtype=np.float32)
        offsets = direction[:, None, None, :] * steps[None, None, :, None]  # heads, levels, points, (x, y)
        offsets = np.broadcast_to(offsets, (self.num_heads, self.num_levels, self.num_points, 2))
        return jnp.asarray(offsets.reshape(shape), dtype)

    def __call__(
        self,
        query: Float[Array, "B Q D"],
        reference: Float[Array, "B Q L 2"],
        offset_scale: Float[Array, "B Q L 2"],
        tokens: Float[Array, "B S D"],
        token_valid: Bool[Array, "B S"],
        level_sizes: Sequence[tuple[int, int]],
    ) -> Float[Array, "B Q D"]:
        """Points lie at reference + offset * offset_scale, (x, y) of each padded map; padded tokens read as zeros.

        The scale is one cell, (1 / width, 1 / height), around a point, and in a box half its size over `num_points`.
        """
        batch, num_queries, _ = query.shape
        num_levels, num_points = self.num_levels, self.num_points
        value = jnp.where(token_valid[..., None], self.value(tokens), 0)  # after the layer: padding has no bias either
        value = value.reshape(batch, value.shape[1], self.num_heads, -1)
        offsets = self.sampling_offsets(query)
        offsets = offsets.reshape(batch, num_queries, self.num_heads, num_levels, num_points, 2)
        location = reference[:, :, None, :, None] + offsets * offset_scale[:, :, None, :, None]
        weight = self.attention_weights(query).reshape(batch, num_queries, self.num_heads, num_levels * num_points)
        weight = jax.nn.softmax(weight, axis=-1).reshape(location.shape[:-1])
        sampled = sample_levels(value, level_sizes, location, weight)
        return self.out(sampled.reshape(batch, num_queries, -1))

"""Multi-scale deformable attention: a query looks at a few points of each feature map, wherever it wants them.

Source: Zhu et al., "Deformable DETR" (arXiv:2010.04159), equation 3. level_sampling.py reads the points, with JAX
alone or, on TPUs, with a Pallas kernel.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.models.layers.compute import EXACT, Compute
from deperceiver_jax.models.layers.initializers import zeros
from deperceiver_jax.models.layers.level_sampling import PORTABLE, SAMPLINGS, sample_levels
from deperceiver_jax.models.layers.linear import linear, xavier_start
from deperceiver_jax.models.layers.recorder import record_points


class MultiScaleDeformableAttention(nnx.Module):
    """Each query reads `num_points` points of every level for every head, at learned offsets from its reference point.

    Offsets start as a star: head h looks along its own direction, point k at k steps of it; all points weigh alike.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int,
        sampling: str,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads is {num_heads}; it must divide {dim}, the width of the deformable attention.")
        if num_points < 1:
            raise UserError(f"A deformable attention with {num_points} points looks nowhere; num_points is at least 1.")
        check_choice("sampling", sampling, SAMPLINGS)
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling = PORTABLE if compute.portable else sampling
        points = num_heads * num_levels * num_points
        self.value, self.out = (
            linear(dim, dim, **xavier_start(dim, dim), dtype=compute.dtype, rngs=rngs) for _ in range(2)
        )
        # Where to look and how much is decided in float32: a bfloat16 offset would be coarser than a cell.
        exact = dict(kernel_init=zeros, **EXACT, rngs=rngs)
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
        record_points(self, location, weight, reference)
        sampled = sample_levels(value, level_sizes, location, weight, sampling=self.sampling)
        return self.out(sampled.reshape(batch, num_queries, -1))

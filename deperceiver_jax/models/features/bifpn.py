"""BiFPN: maps of the backbone at several strides, mixed from coarse to fine and back, several times.

Source: Tan et al., "EfficientDet: Scalable and Efficient Object Detection" (arXiv:1911.09070), sections 3.2 and 3.3.
Every cell has a LayerNorm where EfficientDet has batch norms, so that an image's features depend neither on the other
images of a batch nor on padding.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import check_at_least
from deperceiver_jax.models.features.feature_pyramid import blank, enlarge, sources
from deperceiver_jax.models.features.tokens import feature_valid
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import PaddedConvolution
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack
from deperceiver_jax.models.layers.linear import linear
from deperceiver_jax.models.layers.max_pool import max_pool


class Fusion(nnx.Module):
    """Fast normalised fusion: maps of one size, weighted by shares that are learned, then swish and a 3x3 convolution.

    The convolution is depthwise separable.
    """

    def __init__(self, num_maps: int, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.weight = nnx.Param(np.ones(num_maps, np.float32))
        self.depthwise = PaddedConvolution(dim, dim, 3, groups=dim, use_bias=False, compute=compute, rngs=rngs)
        self.pointwise = linear(dim, dim, dtype=compute.dtype, rngs=rngs)
        self.norm = LayerNorm(dim, dtype=compute.dtype)

    def __call__(self, maps: Sequence[Float[Array, "B h w D"]], valid: Bool[Array, "B h w"]) -> Float[Array, "B h w D"]:
        weight = jax.nn.relu(self.weight[...])
        share = (weight / (weight.sum() + 1e-4)).astype(maps[0].dtype)
        mixed = sum(share[i] * x for i, x in enumerate(maps))
        return self.norm(self.pointwise(self.depthwise(blank(jax.nn.swish(mixed), valid))))


class BiFPNLayer(nnx.Module):
    """Each map gets the coarser one, enlarged; then each gets the finer one, pooled, and what it was itself."""

    def __init__(self, num_maps: int, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        how: dict = dict(compute=compute, rngs=rngs)
        self.portable = compute.portable
        self.down = nnx.List([Fusion(2, dim, **how) for _ in range(num_maps - 1)])
        self.up = nnx.List([Fusion(3 if i < num_maps - 2 else 2, dim, **how) for i in range(num_maps - 1)])

    def __call__(self, maps: tuple[Array, ...], valid: tuple[Array, ...], *, dropout_key=None) -> tuple[Array, ...]:
        """`maps` from fine to coarse. There is no dropout; LayerStack passes the key to every layer."""
        del dropout_key
        middle = list(maps)
        for i in reversed(range(len(maps) - 1)):
            coarser = enlarge(middle[i + 1], *maps[i].shape[1:3])
            middle[i] = self.down[i]([maps[i], coarser], valid[i])
        out = middle[:1]
        for i in range(1, len(maps)):
            own = [maps[i], middle[i]] if i < len(maps) - 1 else [maps[i]]
            finer = max_pool(jnp.where(valid[i - 1][..., None], out[-1], -jnp.inf), portable=self.portable)
            out.append(self.up[i - 1]([*own, blank(finer, valid[i])], valid[i]))
        return tuple(out)


class BiFPN(nnx.Module):
    """Backbone features -> maps of `dim` channels at `strides`, which `num_layers` layers have mixed.

    All maps of the backbone from the finest of `strides` to the last take part, as in a FeaturePyramid.
    """

    def __init__(
        self,
        channels: dict[int, int],
        dim: int,
        *,
        strides: Sequence[int],
        num_layers: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_at_least("config.model.neck_layers", num_layers, 1)
        self.strides = tuple(sorted(strides))
        self.sources = sources(strides, top_down=True)
        how: dict = dict(compute=compute, rngs=rngs)
        self.projections = nnx.List([linear(channels[s], dim, dtype=compute.dtype, rngs=rngs) for s in self.sources])
        self.norms = nnx.List([LayerNorm(dim, dtype=compute.dtype) for _ in self.sources])
        self.layers = LayerStack(BiFPNLayer, num_layers, len(self.sources), dim, **how)

    def __call__(
        self, features: dict[int, Float[Array, "B h w C"]], pixel_valid: Bool[Array, "B H W"]
    ) -> tuple[list[Float[Array, "B h w D"]], list[Bool[Array, "B h w"]]]:
        """The maps and which of their cells are real."""
        projected = [
            norm(projection(features[s]))
            for norm, projection, s in zip(self.norms, self.projections, self.sources, strict=True)
        ]
        valid = tuple(feature_valid(pixel_valid, *x.shape[1:3]) for x in projected)
        mixed = dict(zip(self.sources, zip(self.layers(tuple(projected), valid), valid, strict=True), strict=True))
        maps, map_valid = zip(*(mixed[s] for s in self.strides), strict=True)
        return list(maps), list(map_valid)

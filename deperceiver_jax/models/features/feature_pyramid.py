"""Feature pyramids: maps of the backbone at several strides, each of which knows what the coarser ones know.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144), section 3.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import check_at_least
from deperceiver_jax.models.features.tokens import feature_valid
from deperceiver_jax.models.layers.activations import relu
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import PaddedConvolution
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack
from deperceiver_jax.models.layers.linear import linear


class NeckBlock(nnx.Module):
    """x + convolution(relu(convolution(norm(x)))), both 3x3: a cell learns what lies around it."""

    def __init__(self, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.norm = LayerNorm(dim, dtype=compute.dtype)
        self.inner, self.outer = (PaddedConvolution(dim, dim, 3, compute=compute, rngs=rngs) for _ in range(2))

    def __call__(self, x: Float[Array, "B h w D"], valid: Bool[Array, "B h w"], *, dropout_key=None):
        """Padding is zero before the convolutions. There is no dropout; LayerStack passes the key to every layer."""
        del dropout_key
        inner = self.inner(blank(self.norm(x), valid))
        return x + self.outer(relu(blank(inner, valid)))


class FeaturePyramid(nnx.Module):
    """Backbone features -> maps of `dim` channels at `strides`.

    With `top_down`, each map of the backbone is projected, gets the coarser one, enlarged, and goes through a 3x3
    convolution. Then come `neck_blocks` of each map's own, and a norm.
    """

    def __init__(
        self,
        channels: dict[int, int],
        dim: int,
        *,
        strides: Sequence[int],
        top_down: bool,
        neck_blocks: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_at_least("config.model.neck_blocks", neck_blocks, 0)
        dtype = compute.dtype
        self.strides = tuple(sorted(strides))
        self.top_down = top_down
        self.sources = sources(strides, top_down=top_down)
        self.projections = nnx.List([linear(channels[s], dim, dtype=dtype, rngs=rngs) for s in self.sources])
        convolutions = [PaddedConvolution(dim, dim, 3, compute=compute, rngs=rngs) for _ in self.strides if top_down]
        self.convolutions = nnx.List(convolutions)
        # A fine map of a large image has many times more cells than there are latents: a block keeps its input alone.
        how: dict = dict(unroll_on_cpu=True, keep_inputs=True, compute=compute, rngs=rngs)
        self.blocks = nnx.List([LayerStack(NeckBlock, neck_blocks, dim, **how) for _ in self.strides if neck_blocks])
        self.norms = nnx.List([LayerNorm(dim, dtype=dtype) for _ in self.strides])

    def __call__(
        self, features: dict[int, Float[Array, "B h w C"]], pixel_valid: Bool[Array, "B H W"]
    ) -> tuple[list[Float[Array, "B h w D"]], list[Bool[Array, "B h w"]]]:
        """The maps and which of their cells are real. Padding is zero before the convolutions."""
        maps = {s: projection(features[s]) for projection, s in zip(self.projections, self.sources, strict=True)}
        valid = {s: feature_valid(pixel_valid, *maps[s].shape[1:3]) for s in self.strides}
        if self.top_down:
            for coarse, fine in zip(self.sources[:0:-1], self.sources[-2::-1], strict=True):
                maps[fine] = maps[fine] + enlarge(maps[coarse], *maps[fine].shape[1:3])
            for convolution, s in zip(self.convolutions, self.strides, strict=True):
                maps[s] = convolution(blank(maps[s], valid[s]))
        if self.blocks:
            for blocks, s in zip(self.blocks, self.strides, strict=True):
                maps[s] = blocks(maps[s], valid[s])
        return [norm(maps[s]) for norm, s in zip(self.norms, self.strides, strict=True)], list(valid.values())


def blank(x: Float[Array, "B h w D"], valid: Bool[Array, "B h w"]) -> Float[Array, "B h w D"]:
    """Zeros on padding, as beyond the frame."""
    return jnp.where(valid[..., None], x, 0)


def sources(strides: Sequence[int], *, top_down: bool) -> tuple[int, ...]:
    """The backbone's strides that the maps are made of: with `top_down`, all from the finest to the last."""
    return tuple(s for s in (4, 8, 16, 32) if s in strides or (top_down and s > min(strides)))


def enlarge(x: Float[Array, "B h w D"], height: int, width: int) -> Float[Array, "B height width D"]:
    """Every cell twice along both sides, cut to size: where a cell comes from does not depend on the padding."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]

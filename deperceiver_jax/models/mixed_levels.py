"""Feature maps of the backbone at several strides, with what the deep ones know mixed into the fine ones.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144), section 3.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.layer_norm import LayerNorm
from deperceiver_jax.models.linear import linear
from deperceiver_jax.models.tokens import feature_valid


class MixedLevels(nnx.Module):
    """Backbone features -> maps of `dim` channels at `strides`; with `top_down`, deeper ones are mixed into them.

    Mixing lets fine maps know what the deep layers know (feature pyramids, arXiv:1612.03144): each map of the backbone
    is projected, gets the coarser one, enlarged, and goes through a 3x3 convolution. A norm ends either way.
    """

    def __init__(
        self, channels: dict[int, int], dim: int, *, strides: Sequence[int], top_down: bool, dtype, rngs: nnx.Rngs
    ):
        self.strides = tuple(sorted(strides))
        self.top_down = top_down
        self.sources = sources(strides, top_down=top_down)
        self.projections = nnx.List([linear(channels[s], dim, dtype=dtype, rngs=rngs) for s in self.sources])
        self.convolutions = nnx.List(
            [nnx.Conv(dim, dim, (3, 3), padding=1, dtype=dtype, rngs=rngs) for _ in self.strides if top_down]
        )
        self.norms = nnx.List([LayerNorm(dim, dtype=dtype) for _ in self.strides])

    def __call__(
        self, features: dict[int, Float[Array, "B h w C"]], pixel_valid: Bool[Array, "B H W"]
    ) -> tuple[list[Float[Array, "B h w D"]], list[Bool[Array, "B h w"]]]:
        """The maps and which of their cells are real. Padding is zero before the convolutions, as beyond the frame."""
        maps = {s: projection(features[s]) for projection, s in zip(self.projections, self.sources, strict=True)}
        valid = {s: feature_valid(pixel_valid, *maps[s].shape[1:3]) for s in self.strides}
        if self.top_down:
            for coarse, fine in zip(self.sources[:0:-1], self.sources[-2::-1], strict=True):
                maps[fine] = maps[fine] + enlarge(maps[coarse], *maps[fine].shape[1:3])
            for convolution, s in zip(self.convolutions, self.strides, strict=True):
                maps[s] = convolution(jnp.where(valid[s][..., None], maps[s], 0))
        return [norm(maps[s]) for norm, s in zip(self.norms, self.strides, strict=True)], list(valid.values())


def sources(strides: Sequence[int], *, top_down: bool) -> tuple[int, ...]:
    """The backbone's strides that the maps are made of: with mixing, all from the finest to the last."""
    return tuple(s for s in (4, 8, 16, 32) if s in strides or (top_down and s > min(strides)))


def enlarge(x: Float[Array, "B h w D"], height: int, width: int) -> Float[Array, "B height width D"]:
    """Every cell twice along both sides, cut to size: where a cell comes from does not depend on the padding."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]

"""Where a query of SMCA looks: a Gaussian for every head and level, and how much each level counts.

Source: Gao et al. (arXiv:2101.07448), eq. 3 to 7, and its released code. All of it is computed in float32: coordinates
need more digits than bfloat16 has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import check_above_zero, check_at_least, check_choice
from deperceiver_jax.models.attention.choice import LARGE
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.kernels.log_gaussian import Bias, LogGaussian
from deperceiver_jax.models.layers.compute import EXACT
from deperceiver_jax.models.layers.initializers import ones, zeros
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.linear import linear, xavier_uniform_init

MODULATIONS = ("none", "head_shared", "multi_head")
# How many scales a Gaussian has: none to predict, one, one for x and one for y, and one for their product as well
SCALES = {"fixed": 0, "single": 1, "independent": 2, "coupled": 3}
SCALE_FORMS = ("inverse", "width")


@dataclass(frozen=True)
class ModulationFields:
    """config.model.decoder"""

    num_layers: int
    num_heads: int
    mlp_dim: int
    modulation: str
    gaussian_scale: str
    scale_form: str
    beta: float
    stride_factor: bool
    center_layers: int  # of the MLP that estimates centres
    scale_selection: bool

    def __post_init__(self):
        for name in ("num_layers", "center_layers", "mlp_dim"):
            check_at_least(f"config.model.decoder.{name}", getattr(self, name), 1)
        check_choice("config.model.decoder.modulation", self.modulation, MODULATIONS)
        check_choice("config.model.decoder.gaussian_scale", self.gaussian_scale, SCALES)
        check_choice("config.model.decoder.scale_form", self.scale_form, SCALE_FORMS)
        check_above_zero("config.model.decoder.beta", self.beta)


class SpatialModulation(nnx.Module):
    """Queries -> the logarithm of a Gaussian-like weight map, to be added to attention logits, and weights of levels.

    For head i of a query in level j, at the cell (x, y), with dx = x - c_x - offset_x and dy alike,

        log G = -m_j (a_x^2 dx^2 + a_y^2 dy^2) / beta.

    c is the query's centre in cells of the level. `multi_head` predicts offset and a for every head, in cells;
    `head_shared` predicts a alone, once for all heads. `gaussian_scale`: a_x = a_y = 1 (fixed); one prediction for both
    (single); two (independent); with a third, coupled adds a_xy^2 dx^2 dy^2 (the released code's type 4).
    `scale_form`: the prediction is a (inverse, the released code) or the width 1 / a (width, the paper's eq. 4).
    `stride_factor`: m_j is stride / 32 as in the released code, else 1 as in the paper.
    `scale_selection`: each query weighs the levels by a softmax (eq. 7); without it all count alike, with weight 1.
    """

    def __init__(self, dim: int, fields: ModulationFields, *, strides: Sequence[int], rngs: nnx.Rngs):
        self.fields, self.strides = fields, tuple(strides)
        num_levels = len(self.strides)
        self.num_heads = fields.num_heads if fields.modulation == "multi_head" else 1
        self.num_scales = SCALES[fields.gaussian_scale]
        self.modulates = fields.modulation != "none"
        select = fields.scale_selection and num_levels > 1
        count = num_levels * self.num_heads
        constant = dict(kernel_init=zeros, bias_init=ones)

        def layer(width, **init):
            init = init or dict(kernel_init=xavier_uniform_init(dim, width))
            return linear(dim, width, **init, **EXACT, rngs=rngs)

        self.norm = LayerNorm(dim, dtype=jnp.float32) if self.modulates or select else None
        self.offset = layer(2 * count) if fields.modulation == "multi_head" else None
        self.scale = layer(self.num_scales * count, **constant) if self.modulates and self.num_scales else None
        self.selection = layer(num_levels) if select else None

    def __call__(
        self, query: Float[Array, "B Q D"], center: Float[Array, "B Q 2"] | None, image: LevelTokens
    ) -> tuple[list[Bias] | None, Float[Array, "B Q L"] | None]:
        """Of each level its map, and the levels' weights. `center` is (x, y) in pixels of the image of these tokens.

        A LogGaussian where attention is never a whole matrix and every head has its own, else a map; H is 1 where heads
        share it. None where there is no modulation, or no selection.
        """
        if self.norm is None:
            return None, None
        query = self.norm(query)
        weight = None if self.selection is None else jax.nn.softmax(self.selection(query), axis=-1)
        if not self.modulates:
            return None, weight
        place, scale = self._gaussians(query, center)
        maps: list[Bias] = []
        for level, (size, stride) in enumerate(zip(image.sizes, self.strides, strict=True)):
            factor = self._factor(stride) / self.fields.beta
            own_place, own_scale = place[:, :, level].swapaxes(1, 2), scale[:, :, level].swapaxes(1, 2)
            entries = query.shape[1] * size[0] * size[1]
            large = isinstance(entries, int) and entries >= LARGE  # a whole map is cheaper from its rows and columns
            if not large or self.offset is None or scale.shape[-1] == 3:
                maps.append(-factor * _quadratic(own_place, jnp.square(own_scale), *size))
            else:
                cells = jnp.broadcast_to(_cells(*size), (len(query), size[0] * size[1], 2))
                maps.append(LogGaussian(own_place, own_scale * (2 * factor) ** 0.5, cells))
        return maps, weight

    def _gaussians(self, query, center) -> tuple[Float[Array, "B Q L H 2"], Float[Array, "B Q L H n"]]:
        """Centres in cells, and a_x, a_y and a_xy, whose squares multiply dx^2, dy^2 and dx^2 dy^2."""
        shape = (*query.shape[:2], len(self.strides), self.num_heads)
        place = center[:, :, None] / jnp.asarray(self.strides, jnp.float32)[None, None, :, None]
        place = jnp.broadcast_to(place[:, :, :, None], (*shape, 2))
        if self.offset is not None:
            place = place + self.offset(query).reshape(*shape, 2)
        if self.scale is None:
            scale = jnp.ones((*shape, 1), jnp.float32)
        else:
            scale = self.scale(query).reshape(*shape, self.num_scales)
            if self.fields.scale_form == "width":  # a width of a hundredth of a cell is as narrow as can be
                scale = jax.lax.rsqrt(jnp.square(scale) + 1e-4)
        if self.num_scales < 2:
            scale = jnp.concatenate([scale, scale], axis=-1)
        return place, scale

    def _factor(self, stride: int) -> float:
        return stride / 32 if self.fields.stride_factor else 1.0


def _cells(height: int, width: int) -> Float[Array, "h*w 2"]:
    """(x, y) of every cell."""
    y, x = jnp.mgrid[:height, :width].reshape(2, -1)
    return jnp.stack([x, y], axis=-1).astype(jnp.float32)


def _quadratic(
    place: Float[Array, "B H Q 2"], precision: Float[Array, "B H Q n"], height: int, width: int
) -> Float[Array, "B H Q h*w"]:
    """a_x^2 dx^2 + a_y^2 dy^2 (+ a_xy^2 dx^2 dy^2) at every cell, from one row and one column of squares."""
    dx = jnp.square(place[..., 0, None] - jnp.arange(width, dtype=jnp.float32)[None, None, None])
    dy = jnp.square(place[..., 1, None] - jnp.arange(height, dtype=jnp.float32)[None, None, None])
    total = (precision[..., 0, None] * dx)[..., None, :] + (precision[..., 1, None] * dy)[..., None]
    if precision.shape[-1] == 3:
        total = total + (precision[..., 2, None] * dx)[..., None, :] * dy[..., None]
    return total.reshape(*total.shape[:3], height * width)

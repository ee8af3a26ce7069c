"""Feature maps of one or more strides -> the tokens that DePerceiver's latents read."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.features.position_encoding import PositionEncoding
from deperceiver_jax.models.features.projected_levels import ProjectedLevels
from deperceiver_jax.models.features.pyramid import LevelTokens, make_level_tokens
from deperceiver_jax.models.features.tokens import concatenate_levels, feature_valid, flatten_map, size_in_cells
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import normal


class TokenLevels(ProjectedLevels):
    """Each map is projected by a 1x1 convolution and gets its position encoding.

    With several levels, the last `level_dim` channels are a learned vector that tells them apart. `position["use"]`:
    `add` puts positions into the tokens, `keys` beside them, for the keys of every cross-attention.
    """

    def __init__(
        self,
        channels: dict[int, int],
        *,
        strides: tuple[int, ...],
        width: int,
        level_dim: int,
        position: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        """`width` is that of the tokens, `level_dim` the level's part of it where there are several."""
        position = dict(position)
        use = position.pop("use", None)
        check_choice("config.model.position.use", use, ("add", "keys"))
        several = len(strides) > 1
        self.level_dim = level_dim if several else 0
        if not 0 <= self.level_dim < width or (several and level_dim < 1):
            raise UserError(
                f"config.model.level_dim is {level_dim}; it can be 1 to {width - 1} of the tokens' channels."
            )
        self.strides = strides
        self.adds_position = use == "add"
        dim = width - self.level_dim
        super().__init__([channels[stride] for stride in strides], dim, compute=compute, rngs=rngs)
        self.position = build_part(
            PositionEncoding, "config.model.position", position, dim, dtype=compute.dtype, rngs=rngs
        )
        tags = (len(strides), self.level_dim)
        self.level_embedding = nnx.Param(normal(1.0)(rngs.params(), tags)) if several else None

    def __call__(self, features: dict[int, Array], pixel_valid: Bool[Array, "B H W"]) -> LevelTokens:
        maps, map_valid, positions = [], [], []
        for level, x in enumerate(super().__call__([features[stride] for stride in self.strides])):
            valid = feature_valid(pixel_valid, *x.shape[1:3])
            position = self.position(valid).astype(x.dtype)
            if self.adds_position:
                x = x + position
            if self.level_embedding is not None:
                shape = (*x.shape[:-1], self.level_dim)
                tag = self.level_embedding[level].astype(x.dtype)
                x = jnp.concatenate([x, jnp.broadcast_to(tag, shape)], axis=-1)
                position = jnp.concatenate([position, jnp.zeros(shape, x.dtype)], axis=-1)
            maps.append(x)
            map_valid.append(valid)
            positions.append(flatten_map(position))
        tokens = make_level_tokens(maps, map_valid, size_in_cells(pixel_valid, self.strides))
        return tokens if self.adds_position else tokens.replace(position=concatenate_levels(positions))

"""The tokens of all levels in one row, with everything that a transformer asks of them."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.features.position_encoding import sine_waves
from deperceiver_jax.models.features.tokens import cell_places, concatenate_levels, flatten_map


class LevelTokens(struct.PyTreeNode):
    """The cells of one or several feature maps, one map after the other, each row by row. A map is a level."""

    tokens: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]
    position: Float[Array, "B S D"] | None  # what is added to the tokens where an attention makes its keys, if anything
    places: Float[Array, "B S 2"]  # (x, y) of each cell's centre in [0, 1] of the image, beyond 1 on padding
    extent: Float[Array, "B L 2"]  # (x, y): the image's width and height in cells of each level
    sizes: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (height, width) of each level's padded map

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each level."""
        return tuple(height * width for height, width in self.sizes)

    @property
    def keys(self) -> Float[Array, "B S D"]:
        """The tokens with their positions."""
        return self.tokens if self.position is None else self.tokens + self.position

    @property
    def cell_size(self) -> Float[Array, "1 1 L 2"]:
        """(1 / width, 1 / height) of each padded map: the unit of offsets around a point."""
        return jnp.asarray([(1 / width, 1 / height) for height, width in self.sizes], jnp.float32)[None, None]

    @property
    def valid_share(self) -> Float[Array, "B 1 L 2"]:
        """(x, y): how much of each padded map is image."""
        return self.extent[:, None] * self.cell_size

    def split(self, x: Float[Array, "B S C"]) -> list[Float[Array, "B s C"]]:
        """What is said of all tokens, level by level."""
        return jnp.split(x, list(itertools.accumulate(self.lengths))[:-1], axis=1)

    def maps(self, x: Float[Array, "B S C"]) -> list[Float[Array, "B h w C"]]:
        """The same as maps."""
        return [part.reshape(x.shape[0], *size, -1) for part, size in zip(self.split(x), self.sizes, strict=True)]


def make_level_tokens(
    maps: Sequence[Float[Array, "B h w D"]], map_valid: Sequence[Bool[Array, "B h w"]], extent: Float[Array, "B L 2"]
) -> LevelTokens:
    """From the maps of all levels, their masks, and the image's size in their cells, whole ones or not (tokens.py)."""
    sizes = tuple((x.shape[1], x.shape[2]) for x in maps)
    return LevelTokens(
        tokens=concatenate_levels([flatten_map(x) for x in maps]),
        valid=concatenate_levels([valid.reshape(valid.shape[0], -1) for valid in map_valid]),
        position=None,
        places=concatenate_levels([cell_places(*size, extent[:, level]) for level, size in enumerate(sizes)]),
        extent=extent,
        sizes=sizes,
    )


def sine_positions(tokens: LevelTokens, level_embedding: Float[Array, "L D"]) -> Float[Array, "B S D"]:
    """Sine waves of each token's place, y first, and what says which level it is of."""
    dim = level_embedding.shape[1]
    of_level = [
        jnp.broadcast_to(level_embedding[level][None, None], (1, length, dim))
        for level, length in enumerate(tokens.lengths)
    ]
    return sine_waves(tokens.places[..., ::-1], dim // 2) + concatenate_levels(of_level)

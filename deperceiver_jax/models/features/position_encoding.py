"""Position encodings of a feature map: sine and learned as in DETR, Fourier features as in Perceiver IO."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError, check_at_least, check_choice
from deperceiver_jax.models.layers.initializers import uniform
from deperceiver_jax.models.layers.linear import linear


def sine_waves(shares: Float[Array, "*S N"], dim: int) -> Float[Array, "*S N*dim"]:
    """`dim` interleaved sines and cosines of each number, of wavelengths from 1 to nearly 10000.

    For places, (y, x), and boxes in [0, 1] of the image. Source: Deformable DETR's transformer and position encoding.
    """
    channel = np.arange(dim).reshape(*[1] * shares.ndim, dim)
    angle = 2 * jnp.pi * shares[..., None] / (10000.0 ** (2 * (channel // 2) / dim)).astype(jnp.float32)
    waves = jnp.where(channel % 2 == 0, jnp.sin(angle), jnp.cos(angle))
    return waves.reshape(*shares.shape[:-1], -1)


def sine_encoding(token_valid: Bool[Array, "B h w"], dim: int) -> Float[Array, "B h w dim"]:
    """DETR's sine encoding: dim/2 channels of y, then dim/2 of x.

    Positions count valid cells from 1 and are scaled to 1 at the last row and column of the map. Source: DETR's
    position_encoding.py.
    """

    def share(axis):
        count = jnp.cumsum(token_valid.astype(jnp.float32), axis=axis)
        last = jax.lax.slice_in_dim(count, count.shape[axis] - 1, count.shape[axis], axis=axis)
        return count / (last + 1e-6)

    return sine_waves(jnp.stack([share(1), share(2)], axis=-1), dim // 2)


def fourier_encoding(token_valid: Bool[Array, "B h w"], num_bands: int) -> Float[Array, "B h w 4*num_bands+2"]:
    """Perceiver IO's Fourier features of the valid area: sin y, cos y, sin x, cos x (num_bands each), y, x.

    Positions run from -1 to 1 over the valid cells of each image, and the bands from 1 to half their number (Nyquist),
    so the encoding does not depend on the padding. Source: arXiv:2107.14795, appendix; axis order (row, column).
    """

    def encode(axis):
        count = jnp.max(jnp.sum(token_valid, axis=axis), axis=1).astype(jnp.float32)  # [B]
        index = jnp.arange(token_valid.shape[axis], dtype=jnp.float32)
        position = 2 * index[None] / jnp.maximum(count - 1, 1)[:, None] - 1  # [B, n]
        bands = 1 + (count[:, None] / 2 - 1) * jnp.linspace(0.0, 1.0, num_bands)[None]  # [B, K]
        angle = jnp.pi * position[:, :, None] * bands[:, None, :]
        return position[..., None], jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    batch, height, width = token_valid.shape
    (y, waves_y), (x, waves_x) = encode(1), encode(2)
    rows = [jnp.broadcast_to(a[:, :, None], (batch, height, width, a.shape[-1])) for a in (waves_y, y)]
    columns = [jnp.broadcast_to(a[:, None, :], (batch, height, width, a.shape[-1])) for a in (waves_x, x)]
    return jnp.concatenate([rows[0], columns[0], rows[1], columns[1]], axis=-1)


class PositionEncoding(nnx.Module):
    """The encoding that a config names, with `dim` channels."""

    def __init__(self, dim: int, *, encoding: str, fourier_bands: int, learned_size: int, dtype, rngs: nnx.Rngs):
        check_choice("config.model.position.encoding", encoding, ("sine", "learned", "fourier"))
        check_at_least("config.model.position.fourier_bands", fourier_bands, 1)
        check_at_least("config.model.position.learned_size", learned_size, 1)
        if dim % 2 and encoding != "fourier":
            raise UserError(f"Half of a position's {dim} channels are for rows: config.model.embed_dim must be even.")
        self.encoding = encoding
        self.dim = dim
        self.fourier_bands = fourier_bands
        self.learned_size = learned_size
        if encoding == "learned":
            table = uniform(0.0, 1.0)
            self.column = nnx.Param(table(rngs.params(), (learned_size, dim // 2)))
            self.row = nnx.Param(table(rngs.params(), (learned_size, dim // 2)))
        if encoding == "fourier":
            self.projection = linear(4 * fourier_bands + 2, dim, dtype=dtype, rngs=rngs)

    def __call__(self, token_valid: Bool[Array, "B h w"]) -> Float[Array, "B h w dim"]:
        """float32. Learned tables hold column (x) channels first, the opposite of sine, as in DETR."""
        batch, height, width = token_valid.shape
        if self.encoding == "sine":
            return sine_encoding(token_valid, self.dim)
        if self.encoding == "fourier":
            return self.projection(fourier_encoding(token_valid, self.fourier_bands))
        if not isinstance(height, int):
            raise UserError(
                "config.model.position.encoding is learned, for maps of at most config.model.position.learned_size "
                "cells a side: a file for frames of any size cannot have it; give --size=HEIGHTxWIDTH."
            )
        if max(height, width) > self.learned_size:
            raise UserError(
                f"A feature map of {height} x {width} cells needs config.model.position.learned_size >= "
                f"{max(height, width)}; it is {self.learned_size}."
            )
        x = jnp.broadcast_to(self.column[None, :width], (height, width, self.dim // 2))
        y = jnp.broadcast_to(self.row[:height, None], (height, width, self.dim // 2))
        return jnp.broadcast_to(jnp.concatenate([x, y], axis=-1), (batch, height, width, self.dim))

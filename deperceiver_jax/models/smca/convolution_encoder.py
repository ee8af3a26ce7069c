"""The encoder of the released multi-scale SMCA: large depthwise convolutions instead of attention.

Source: the released code of Gao et al. (arXiv:2101.07448); the paper has attention in their place. Padding is not
masked: as in the released code, an image's features depend a little on the padding around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.models.features.pyramid import LevelTokens
from deperceiver_jax.models.features.tokens import flatten_map
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import PaddedConvolution
from deperceiver_jax.models.layers.layer_norm import LayerNorm
from deperceiver_jax.models.layers.layer_stack import LayerStack, start_alike
from deperceiver_jax.models.layers.linear import linear, split_key, torch_bias_init, torch_start, xavier_uniform_init
from deperceiver_jax.models.layers.transformer_layer import TransformerLayer


def interpolation_matrix(size_in: int, size_out: int) -> Float[Array, "size_out size_in"]:
    """Linear interpolation in which first and last cells coincide (PyTorch's align_corners)."""
    if not isinstance(size_out, int):  # a symbol, in a file for pictures of any size: in whole numbers for exactness
        steps, rows, columns = size_out - 1, jnp.arange(size_out)[:, None], jnp.arange(size_in)[None]
        steps = jnp.maximum(steps, 1)
        return jnp.maximum(0.0, 1.0 - jnp.abs(rows * (size_in - 1) - columns * steps) / steps)
    place = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(size_in)[None]))


def resize_align_corners(x: Float[Array, "B h w D"], height: int, width: int) -> Float[Array, "B H W D"]:
    """Bilinear. `jax.image.resize` puts the cells of both maps on one square instead, and gives other numbers."""
    rows, columns = (
        jnp.asarray(interpolation_matrix(*sizes), x.dtype) for sizes in ((x.shape[1], height), (x.shape[2], width))
    )
    return jnp.einsum("Ww,bHwd->bHWd", columns, jnp.einsum("Hh,bhwd->bHwd", rows, x))


@dataclass(frozen=True)
class ConvolutionFields:
    """config.model.encoder"""

    num_layers: int
    kernel_size: int
    mlp_dim: int
    pointwise: bool  # a linear layer before and after the convolutions
    share_crossings: bool  # one convolution downwards and one upwards for all pairs of levels, else one a pair

    def __post_init__(self):
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"config.model.encoder.kernel_size is {self.kernel_size}; it must be odd.")
        for name in ("num_layers", "mlp_dim"):
            check_at_least(f"config.model.encoder.{name}", getattr(self, name), 1)


class ConvolutionLayer(TransformerLayer):
    """A depthwise convolution on each level, exchange with the next finer and coarser one, then the MLP.

    Nothing bends between the convolutions and the linear layers around them.
    """

    def __init__(
        self, dim: int, fields: ConvolutionFields, *, num_levels: int, dropout: float, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(dim, mlp_dim=fields.mlp_dim, dropout=dropout, compute=compute, rngs=rngs)
        size = fields.kernel_size
        start = dict(kernel_init=xavier_uniform_init(size**2, dim * size**2), bias_init=torch_bias_init(size**2))

        def depthwise(stride):
            return PaddedConvolution(dim, dim, size, stride=stride, groups=dim, **start, compute=compute, rngs=rngs)

        def mixture():
            return linear(dim, dim, kernel_init=xavier_uniform_init(dim, dim), dtype=compute.dtype, rngs=rngs)

        crossings = 1 if fields.share_crossings else num_levels - 1
        self.before = mixture() if fields.pointwise else None
        self.within = nnx.List([depthwise(1) for _ in range(num_levels)])
        self.down = nnx.List([depthwise(2) for _ in range(crossings)])
        self.up = nnx.List([depthwise(1) for _ in range(crossings)])
        self.after = mixture() if fields.pointwise else None
        self.convolution_norm = LayerNorm(dim, dtype=compute.dtype)

    def __call__(self, x: Float[Array, "B S D"], image: LevelTokens, *, dropout_key=None) -> Float[Array, "B S D"]:
        """`x` are the tokens as the layers before have changed them; the rest of `image` stays as it is."""
        key_convolution, key_mlp = split_key(dropout_key, 2)
        x = self.sublayer(x, self.convolution_norm, lambda y: self._mix(y, image), key_convolution)
        return self.mlp_sublayer(x, key_mlp)

    def _mix(self, y, image: LevelTokens):
        y = y + image.position
        y = y if self.before is None else self.before(y)
        maps = [within(x) for within, x in zip(self.within, image.maps(y), strict=True)]
        mixed = list(maps)
        for finer in range(len(maps) - 1):
            down, up = (convolutions[finer % len(convolutions)] for convolutions in (self.down, self.up))
            mixed[finer + 1] = mixed[finer + 1] + down(maps[finer])
            mixed[finer] = mixed[finer] + resize_align_corners(up(maps[finer + 1]), *maps[finer].shape[1:3])
        mixed = jnp.concatenate([flatten_map(x) for x in mixed], axis=1)
        return mixed if self.after is None else self.after(mixed)


class ConvolutionEncoder(nnx.Module):
    """Convolution layers; then the finest map is halved, and decoded as a second map of the next level's size.

    The halved map takes position and mask of that level.
    """

    def __init__(
        self,
        dim: int,
        fields: ConvolutionFields,
        *,
        strides: Sequence[int],
        dropout: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        if any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)) or len(strides) < 2:
            raise UserError(
                f"config.model.encoder.kind convolution needs two or more levels, each of half the size of the one "
                f"before; config.model.strides and extra_levels make the strides {tuple(strides)}."
            )
        layer: dict = dict(num_levels=len(strides), dropout=dropout, compute=compute, rngs=rngs)
        self.layers = LayerStack(ConvolutionLayer, fields.num_layers, dim, fields, **layer)
        start_alike(self.layers.layers, kernels=False)
        self.reduce = PaddedConvolution(dim, dim, 3, stride=2, **torch_start(9 * dim), compute=compute, rngs=rngs)

    def __call__(self, image: LevelTokens, *, dropout_key=None) -> LevelTokens:
        x = self.layers(image.tokens, image, dropout_key=dropout_key)
        finest, second = image.lengths[:2]
        reduced = flatten_map(self.reduce(image.maps(x)[0]))

        def repeat_second(array):
            return jnp.concatenate([array[:, finest : finest + second], array[:, finest:]], axis=1)

        return LevelTokens(
            tokens=jnp.concatenate([reduced, x[:, finest:]], axis=1),
            valid=repeat_second(image.valid),
            position=repeat_second(image.position),
            places=repeat_second(image.places),
            extent=jnp.concatenate([image.extent[:, 1:2], image.extent[:, 1:]], axis=1),
            sizes=(image.sizes[1], *image.sizes[1:]),
        )

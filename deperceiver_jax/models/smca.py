"""SMCA: DETR whose queries look around centres that they estimate first, on one scale or several.

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", arXiv:2101.07448.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.heads import PredictionHeads
from deperceiver_jax.models.linear import linear, split_key, torch_bias_init, torch_kernel_init
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.position_encoding import sine_encoding
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.smca_convolution import ConvolutionEncoder
from deperceiver_jax.models.smca_transformer import AttentionEncoder, ModulatedDecoder, Tokens
from deperceiver_jax.models.tokens import concatenate_levels, feature_valid, flatten_map, image_size
from deperceiver_jax.structures import Predictions


class Levels(nnx.Module):
    """Backbone features -> maps of `dim` channels: one of each stride, then `extra_levels` of half the size each.

    The first extra level is made from the backbone's last features, each further one from the level before it.
    """

    def __init__(self, channels: Sequence[int], dim: int, *, extra_levels: int, dtype, rngs: nnx.Rngs):
        self.projections = nnx.List([linear(width, dim, dtype=dtype, rngs=rngs) for width in channels])
        self.halvings = nnx.List(
            [
                nnx.Conv(
                    width,
                    dim,
                    (3, 3),
                    strides=2,
                    padding=1,
                    kernel_init=torch_kernel_init,
                    bias_init=torch_bias_init(9 * width),
                    dtype=dtype,
                    rngs=rngs,
                )
                for width in [channels[-1], *[dim] * extra_levels][:extra_levels]
            ]
        )

    def __call__(self, features: Sequence[Float[Array, "B h w C"]]) -> list[Float[Array, "B h w D"]]:
        maps = [projection(x) for projection, x in zip(self.projections, features, strict=True)]
        source = features[-1]
        for halving in self.halvings:
            source = halving(source)
            maps.append(source)
        return maps


class SMCA(nnx.Module):
    """image -> ResNet features -> tokens of all levels -> memory -> decoded queries -> Predictions of every layer.

    Boxes are answered relative to each query's initial centre (eq. 12), unless nothing is modulated.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_logit: bool,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        strides: Sequence[int],
        extra_levels: int,
        level_embedding: bool,
        backbone: dict,
        encoder: dict,
        decoder: dict,
        dtype,
        rngs: nnx.Rngs,
    ):
        if extra_levels < 0:
            raise UserError(f"config.model.extra_levels is {extra_levels}; it can be 0 or more.")
        if embed_dim % 2:
            raise UserError(f"config.model.embed_dim is {embed_dim}; half of it encodes rows, so it must be even.")
        self.strides = tuple(sorted(strides))
        self.embed_dim = embed_dim
        self.dtype = dtype
        self.backbone = build_part(
            ResNet, "config.model.backbone", backbone, strides=self.strides, dtype=dtype, rngs=rngs
        )
        channels = [self.backbone.channels[stride] for stride in self.strides]
        self.levels = Levels(channels, embed_dim, extra_levels=extra_levels, dtype=dtype, rngs=rngs)
        self.level_strides = self.strides + tuple(self.strides[-1] * 2 ** (i + 1) for i in range(extra_levels))
        normal, shape = nnx.initializers.normal(1.0), (len(self.level_strides), embed_dim)
        self.level_embedding = nnx.Param(normal(rngs.params(), shape)) if level_embedding else None
        shared = dict(dim=embed_dim, dropout=dropout, dtype=dtype, rngs=rngs)
        self.encoder = _build_encoder(encoder, self.level_strides, shared)
        self.decoder = build_part(
            ModulatedDecoder,
            "config.model.decoder",
            decoder,
            num_queries=num_queries,
            num_levels=len(self.level_strides),
            **shared,
        )
        num_logits = num_classes + int(no_object_logit)
        self.heads = PredictionHeads(embed_dim, num_logits, rngs=rngs)
        self.heads.class_head.linear.bias[...] = jnp.full(num_logits, -math.log(99))  # classes start at 1 %

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Pixels between the cells of each map that the decoder looks at, in the order of its tokens."""
        if isinstance(self.encoder, ConvolutionEncoder):  # halves the finest map
            return (self.level_strides[1], *self.level_strides[1:])
        return self.level_strides

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        pixel_valid: Bool[Array, "B H W"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py."""
        key_encoder, key_decoder = split_key(dropout_key, 2)
        tokens = self._tokens(self.backbone(image, pixel_valid), pixel_valid)
        memory = self.encoder(tokens, dropout_key=key_encoder)
        decoded, center_logit = self.decoder(memory, image_size(pixel_valid), dropout_key=key_decoder)
        return self.heads(decoded, center_logit=center_logit)

    def _tokens(self, features, pixel_valid) -> Tokens:
        maps = self.levels([features[stride] for stride in self.strides])
        valid = [feature_valid(pixel_valid, *x.shape[1:3]) for x in maps[: len(self.strides)]]
        for x in maps[len(self.strides) :]:  # from the level before, as in the released code
            valid.append(feature_valid(valid[-1], *x.shape[1:3]))
        return Tokens(
            content=concatenate_levels([flatten_map(x) for x in maps]),
            position=concatenate_levels([self._position(v, i) for i, v in enumerate(valid)]),
            valid=concatenate_levels([v.reshape(v.shape[0], -1) for v in valid]),
            sizes=tuple(x.shape[1:3] for x in maps),
            strides=self.level_strides,
        )

    def _position(self, valid: Bool[Array, "B h w"], level: int) -> Float[Array, "B h*w D"]:
        position = flatten_map(sine_encoding(valid, self.embed_dim))
        if self.level_embedding is not None:
            position = position + self.level_embedding[level][None, None]
        return position.astype(self.dtype)


def _build_encoder(encoder: dict, strides: tuple[int, ...], shared: dict) -> nnx.Module:
    encoder = dict(encoder)
    kind = encoder.pop("kind", None)
    if kind == "attention":
        return build_part(AttentionEncoder, "config.model.encoder", encoder, num_levels=len(strides), **shared)
    if kind == "convolution":
        return build_part(ConvolutionEncoder, "config.model.encoder", encoder, strides=strides, **shared)
    raise UserError(f"config.model.encoder.kind is {kind!r}; it can be attention or convolution.")

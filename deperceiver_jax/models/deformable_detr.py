"""Deformable DETR: a ResNet, several levels of tokens, a transformer that looks at few points, and sigmoid classes.

Source: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deformable_transformer import (
    DeformableDecoder,
    DeformableEncoder,
    make_pyramid,
    token_positions,
)
from deperceiver_jax.models.linear import linear, split_key, xavier_uniform_init
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.proposals import Proposals
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.tokens import (
    concatenate_levels,
    feature_valid,
    flatten_map,
    size_in_cells,
    size_in_whole_cells,
)
from deperceiver_jax.structures import Predictions


class Levels(nnx.Module):
    """Backbone features -> maps of `dim` channels: one of each stride, then `extra_levels` of half the size each.

    The first extra level is made from the backbone's last features, each further one from the level before it.
    """

    def __init__(self, channels: Sequence[int], dim: int, *, extra_levels: int, dtype, rngs: nnx.Rngs):
        if dim % 32:
            raise UserError(f"config.model.embed_dim is {dim}; its 32 norm groups must be of equal width.")
        if extra_levels < 0:
            raise UserError(f"config.model.extra_levels is {extra_levels}; it can be 0 or more.")
        self.num_projections = len(channels)
        self.projections = nnx.List()
        self.norms = nnx.List()
        zeros = nnx.initializers.zeros
        for width in channels:
            xavier = xavier_uniform_init(width, dim)
            self.projections.append(linear(width, dim, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs))
        for width in [channels[-1], *[dim] * extra_levels][:extra_levels]:
            self.projections.append(
                nnx.Conv(
                    width,
                    dim,
                    (3, 3),
                    strides=2,
                    padding=1,
                    kernel_init=xavier_uniform_init(9 * width, 9 * dim),
                    bias_init=zeros,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        for _ in self.projections:
            self.norms.append(
                nnx.GroupNorm(dim, num_groups=32, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
            )

    def __call__(self, features: Sequence[Float[Array, "B h w C"]]) -> list[Float[Array, "B h w D"]]:
        """As in the published model, norms count padding too. Refuses a level below a map of a single cell."""
        levels = []
        for number, (projection, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            if number < self.num_projections:
                source = features[number]
            else:
                source = features[-1] if number == self.num_projections else levels[-1]
                if source.shape[1] == source.shape[2] == 1:
                    raise UserError(
                        f"config.model.extra_levels: level {number} of an image of this size would halve a map of a "
                        "single cell; give larger images or fewer levels."
                    )
            levels.append(norm(projection(source)))
        return levels


class DeformableDETR(nnx.Module):
    """image -> ResNet features -> tokens of all levels -> memory -> Predictions of every decoder layer.

    `refine`: each decoder layer corrects the boxes of the one before. `two_stage` (with `refine` only): the queries are
    the best proposals of the encoder rather than learned ones; all proposals come along in `Predictions.proposals`.
    `places`: an image is a whole number of `cells` for its tokens' places, as in the released code, or has the exact
    size in `pixels` that its boxes are measured by.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_logit: bool,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        refine: bool,
        two_stage: bool,
        places: str,
        strides: Sequence[int],
        extra_levels: int,
        backbone: dict,
        encoder: dict,
        decoder: dict,
        dtype,
        rngs: nnx.Rngs,
    ):
        if two_stage and not refine:
            raise UserError(
                "config.model.two_stage needs config.model.refine=True: proposals are boxes, and only refining decoder "
                "layers answer relative to boxes."
            )
        if places not in ("cells", "pixels"):
            raise UserError(f"config.model.places is {places!r}; it can be cells or pixels.")
        self.strides = tuple(sorted(strides))
        self.level_strides = (*self.strides, *(self.strides[-1] * 2**i for i in range(1, extra_levels + 1)))
        self.places = places
        self.dtype = dtype
        self.backbone = build_part(
            ResNet, "config.model.backbone", backbone, strides=self.strides, dtype=dtype, rngs=rngs
        )
        channels = [self.backbone.channels[stride] for stride in self.strides]
        self.levels = Levels(channels, embed_dim, extra_levels=extra_levels, dtype=dtype, rngs=rngs)
        num_levels = len(channels) + extra_levels
        normal = nnx.initializers.normal(1.0)
        self.level_embedding = nnx.Param(normal(rngs.params(), (num_levels, embed_dim)))
        shared = dict(dim=embed_dim, num_levels=num_levels, dropout=dropout, dtype=dtype, rngs=rngs)
        num_logits = num_classes + int(no_object_logit)
        self.encoder = build_part(DeformableEncoder, "config.model.encoder", encoder, **shared)
        if two_stage:
            self.proposals = Proposals(embed_dim, num_logits, num_proposals=num_queries, dtype=dtype, rngs=rngs)
        else:
            self.proposals = None
            self.queries = nnx.Param(normal(rngs.params(), (num_queries, 2 * embed_dim)))  # position, then content
            self.reference_points = linear(
                embed_dim,
                2,
                kernel_init=xavier_uniform_init(embed_dim, 2),
                bias_init=nnx.initializers.zeros,
                dtype=jnp.float32,
                rngs=rngs,
            )
        self.decoder = build_part(
            DeformableDecoder,
            "config.model.decoder",
            decoder,
            num_logits=num_logits,
            refine=refine,
            size_bias=0.0 if two_stage else -2.0,
            **shared,
        )

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        pixel_valid: Bool[Array, "B H W"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py."""
        key_encoder, key_decoder = split_key(dropout_key, 2)
        features = self.backbone(image, pixel_valid)
        maps = self.levels([features[stride] for stride in self.strides])
        map_valid = [feature_valid(pixel_valid, *features.shape[1:3]) for features in maps]
        exact = self.places == "pixels"
        extent = size_in_cells(pixel_valid, self.level_strides) if exact else size_in_whole_cells(map_valid)
        pyramid = make_pyramid(map_valid, extent)
        position = token_positions(pyramid, self.level_embedding[...]).astype(self.dtype)
        tokens = concatenate_levels([flatten_map(features) for features in maps])
        memory = self.encoder(tokens, position, pyramid, dropout_key=key_encoder)
        if self.proposals is None:
            proposals, (content, query_position, reference) = None, self._learned_queries(len(image))
        else:
            proposals, content, query_position, reference = self.proposals(memory, pyramid)
        predictions = self.decoder(content, query_position, reference, memory, pyramid, dropout_key=key_decoder)
        return predictions._replace(proposals=proposals)

    def _learned_queries(self, batch: int):
        """Content, position and reference points; the same for every image."""
        position, content = jnp.split(self.queries[...], 2, axis=-1)
        reference = jax.nn.sigmoid(self.reference_points(position))
        content, position = content.astype(self.dtype), position.astype(self.dtype)
        return [jnp.broadcast_to(x[None], (batch, *x.shape)) for x in (content, position, reference)]

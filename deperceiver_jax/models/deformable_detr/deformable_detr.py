"""Deformable DETR: a ResNet, several levels of tokens, a transformer that looks at few points, and sigmoid classes.

Source: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.field_needs import Need, equal
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.deformable_detr.proposals import Proposals
from deperceiver_jax.models.deformable_detr.transformer import (
    DeformableDecoder,
    DeformableEncoder,
    EncoderFields,
    HalfFields,
)
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.features.bifpn import BiFPN
from deperceiver_jax.models.features.feature_pyramid import FeaturePyramid, sources
from deperceiver_jax.models.features.projected_levels import ProjectedLevels
from deperceiver_jax.models.features.pyramid import LevelTokens, make_level_tokens, sine_positions
from deperceiver_jax.models.features.tokens import feature_valid, size_in_cells, size_in_whole_cells
from deperceiver_jax.models.layers.compute import EXACT, Compute
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.linear import linear, split_key, xavier_start
from deperceiver_jax.structures import Predictions


class DeformableDETR(Detector):
    """image -> ResNet features -> tokens of all levels -> memory -> Predictions of every decoder layer.

    `refine`: each decoder layer corrects the boxes of the one before. `two_stage` (with `refine` only): the queries are
    the best proposals of the encoder rather than learned ones; all proposals come along in `Predictions.proposals`.
    `places`: an image is a whole number of `cells` for its tokens' places, as in the released code, or has the exact
    size in `pixels` that its boxes are measured by.
    `neck`: the backbone's maps are levels as they are (`none`), or are mixed before by a feature pyramid (`fpn`) or
    `neck_layers` of a `bifpn`: the last rows of the paper's Table 2.
    """

    needs = {
        "model.encoder.across_levels": Need(
            lambda config: len(config.model.strides) + config.model.extra_levels > 1, "two or more config.model.strides"
        ),
        "model.neck_layers": equal("model.neck", "bifpn"),
        "loss.auxiliary": Need(
            lambda config: config.model.decoder.num_layers > 1 or config.model.two_stage,
            "config.model.decoder.num_layers of at least 2",
        ),
    }

    def __init__(
        self,
        fields: DetectorFields,
        *,
        refine: bool,
        two_stage: bool,
        places: str,
        extra_levels: int,
        neck: str,
        neck_layers: int,
        encoder: dict,
        decoder: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        if two_stage and not refine:
            raise UserError(
                "config.model.two_stage needs config.model.refine=True: proposals are boxes, and only refining decoder "
                "layers answer relative to boxes."
            )
        check_choice("config.model.places", places, ("cells", "pixels"))
        check_choice("config.model.neck", neck, ("none", "fpn", "bifpn"))
        needed = tuple(sorted({*fields.strides, *sources(fields.strides, top_down=neck != "none")}))
        if neck != "none" and len(needed) < 2:
            raise UserError(f"config.model.neck is {neck}, which mixes maps; config.model.strides {needed} has one.")
        super().__init__(fields, backbone_strides=needed, compute=compute, rngs=rngs)
        self.extra_levels = extra_levels
        self.exact_places = places == "pixels"
        dim = fields.embed_dim
        how: dict = dict(strides=self.strides, num_layers=neck_layers, compute=compute, rngs=rngs)
        self.neck = _make_neck(neck, self.backbone.channels, dim, **how)
        channels = [dim if self.neck else self.backbone.channels[stride] for stride in self.strides]
        self.levels = ProjectedLevels(
            channels, dim, extra_levels=extra_levels, group_norm=True, compute=compute, rngs=rngs
        )
        num_levels = len(self.token_strides)
        self.level_embedding = nnx.Param(normal(1.0)(rngs.params(), (num_levels, dim)))
        shared: dict = dict(num_levels=num_levels, dropout=fields.dropout, compute=compute, rngs=rngs)
        encoder = build_part(EncoderFields, "config.model.encoder", encoder)
        self.encoder = DeformableEncoder(dim, encoder, **shared)
        if two_stage:
            proposals = dict(num_proposals=fields.num_queries, dtype=compute.dtype, rngs=rngs)
            self.proposals = Proposals(dim, fields.num_logits, **proposals)
        else:
            self.proposals = None
            queries = fields.num_queries, 2 * dim  # position, then content
            self.queries = nnx.Param(normal(1.0)(rngs.params(), queries))
            self.reference_points = linear(dim, 2, **xavier_start(dim, 2), **EXACT, rngs=rngs)
        decoder = build_part(HalfFields, "config.model.decoder", decoder)
        size_bias = 0.0 if two_stage else -2.0
        self.decoder = DeformableDecoder(dim, fields.num_logits, decoder, refine=refine, size_bias=size_bias, **shared)

    @property
    def token_strides(self) -> tuple[int, ...]:
        extra = (self.strides[-1] * 2**i for i in range(1, self.extra_levels + 1))
        return (*self.strides, *extra)

    @property
    def fewest_tokens(self) -> int:
        return 1 if self.proposals is None else self.proposals.num_proposals

    def predict(self, image, pixel_valid, dropout_key) -> Predictions:
        key_encoder, key_decoder = split_key(dropout_key, 2)
        memory = self.encoder(self._tokens(self.backbone(image, pixel_valid), pixel_valid), dropout_key=key_encoder)
        if self.proposals is None:
            proposals, (content, query_position, reference) = None, self._learned_queries(image.shape[0])
        else:
            proposals, content, query_position, reference = self.proposals(memory)
        predictions = self.decoder(content, query_position, reference, memory, dropout_key=key_decoder)
        return predictions._replace(proposals=proposals)

    def _tokens(self, features, pixel_valid) -> LevelTokens:
        mixed = self.neck(features, pixel_valid)[0] if self.neck else [features[stride] for stride in self.strides]
        maps = self.levels(mixed)
        map_valid = [feature_valid(pixel_valid, *x.shape[1:3]) for x in maps]
        exact = self.exact_places
        extent = size_in_cells(pixel_valid, self.token_strides) if exact else size_in_whole_cells(map_valid)
        tokens = make_level_tokens(maps, map_valid, extent)
        # The released positions, but not the points, are shares of this much more than the image.
        encoded = make_level_tokens(maps, map_valid, extent + 1e-6)
        return tokens.replace(position=sine_positions(encoded, self.level_embedding[...]).astype(self.dtype))

    def _learned_queries(self, batch: int):
        """Content, position and reference points; the same for every image."""
        position, content = jnp.split(self.queries[...], 2, axis=-1)
        reference = jax.nn.sigmoid(self.reference_points(position))
        content, position = content.astype(self.dtype), position.astype(self.dtype)
        return [jnp.broadcast_to(x[None], (batch, *x.shape)) for x in (content, position, reference)]


def _make_neck(kind: str, *sizes, num_layers: int, **how) -> FeaturePyramid | BiFPN | None:
    """sizes: channels by stride, and the width."""
    if kind == "none":
        return None
    if kind == "fpn":
        return FeaturePyramid(*sizes, top_down=True, neck_blocks=0, **how)
    return BiFPN(*sizes, num_layers=num_layers, **how)

"""SMCA: DETR whose queries look around centres that they estimate first, on one scale or several.

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", arXiv:2101.07448.
"""

from flax import nnx

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.field_needs import Need, at_least
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.features.position_encoding import sine_encoding
from deperceiver_jax.models.features.projected_levels import ProjectedLevels
from deperceiver_jax.models.features.pyramid import LevelTokens, make_level_tokens
from deperceiver_jax.models.features.tokens import (
    concatenate_levels,
    feature_valid,
    flatten_map,
    image_size,
    size_in_cells,
)
from deperceiver_jax.models.heads.heads import PredictionHeads
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import normal
from deperceiver_jax.models.layers.linear import split_key
from deperceiver_jax.models.smca.convolution_encoder import ConvolutionEncoder, ConvolutionFields
from deperceiver_jax.models.smca.spatial_modulation import ModulationFields
from deperceiver_jax.models.smca.transformer import AttentionEncoder, AttentionFields, ModulatedDecoder
from deperceiver_jax.structures import Predictions

_several_levels = Need(
    lambda config: len(config.model.strides) + config.model.extra_levels > 1, "two or more config.model.strides"
)
_modulated = Need(
    lambda config: config.model.decoder.modulation != "none", "config.model.decoder.modulation=multi_head"
)


class SMCA(Detector):
    """image -> ResNet features -> tokens of all levels -> memory -> decoded queries -> Predictions of every layer.

    Boxes are answered relative to each query's initial centre (eq. 12), unless nothing is modulated.
    """

    needs = {
        "model.encoder.share_attention": _several_levels,
        "model.encoder.share_mlp": _several_levels,
        "model.decoder.scale_selection": _several_levels,
        **{f"model.decoder.{field}": _modulated for field in ("gaussian_scale", "beta", "center_layers")},
        "model.decoder.scale_form": Need(
            lambda config: _modulated.holds(config) and config.model.decoder.gaussian_scale != "fixed",
            "config.model.decoder.gaussian_scale=independent",
        ),
        "model.decoder.stride_factor": Need(
            lambda config: (
                config.model.decoder.modulation != "none"
                and (tuple(config.model.strides) != (32,) or config.model.extra_levels > 0)
            ),
            "other config.model.strides than 32 alone",
        ),
        "loss.auxiliary": at_least("model.decoder.num_layers", 2),
    }

    def __init__(
        self,
        fields: DetectorFields,
        *,
        extra_levels: int,
        level_embedding: bool,
        encoder: dict,
        decoder: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        dim = fields.embed_dim
        if dim % 2:
            raise UserError(f"config.model.embed_dim is {dim}; half of it encodes rows, so it must be even.")
        super().__init__(fields, compute=compute, rngs=rngs)
        self.embed_dim = dim
        channels = [self.backbone.channels[stride] for stride in self.strides]
        self.levels = ProjectedLevels(channels, dim, extra_levels=extra_levels, compute=compute, rngs=rngs)
        extra = (self.strides[-1] * 2 ** (i + 1) for i in range(extra_levels))
        self.level_strides = (*self.strides, *extra)
        shape = len(self.level_strides), dim
        self.level_embedding = nnx.Param(normal(1.0)(rngs.params(), shape)) if level_embedding else None
        shared: dict = dict(dropout=fields.dropout, compute=compute, rngs=rngs)
        self.encoder = _build_encoder(encoder, dim, self.level_strides, shared)
        decoder = build_part(ModulationFields, "config.model.decoder", decoder)
        self.decoder = ModulatedDecoder(dim, fields.num_queries, decoder, strides=self.token_strides, **shared)
        self.heads = PredictionHeads(dim, fields.num_logits, rare=True, rngs=rngs)

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Of the maps that the decoder looks at."""
        if isinstance(self.encoder, ConvolutionEncoder):  # halves the finest map
            return (self.level_strides[1], *self.level_strides[1:])
        return self.level_strides

    def predict(self, image, pixel_valid, dropout_key) -> Predictions:
        key_encoder, key_decoder = split_key(dropout_key, 2)
        memory = self.encoder(self._tokens(self.backbone(image, pixel_valid), pixel_valid), dropout_key=key_encoder)
        decoded, center_logit = self.decoder(memory, image_size(pixel_valid), dropout_key=key_decoder)
        return self.heads(decoded, center_logit)

    def _tokens(self, features, pixel_valid) -> LevelTokens:
        maps = self.levels([features[stride] for stride in self.strides])
        valid = [feature_valid(pixel_valid, *x.shape[1:3]) for x in maps[: len(self.strides)]]
        for x in maps[len(self.strides) :]:  # from the level before, as in the released code
            valid.append(feature_valid(valid[-1], *x.shape[1:3]))
        position = concatenate_levels([self._position(v, level) for level, v in enumerate(valid)])
        tokens = make_level_tokens(maps, valid, size_in_cells(pixel_valid, self.level_strides))
        return tokens.replace(position=position)

    def _position(self, valid, level: int):
        position = flatten_map(sine_encoding(valid, self.embed_dim))
        if self.level_embedding is not None:
            position = position + self.level_embedding[level][None, None]
        return position.astype(self.dtype)


def _build_encoder(encoder: dict, dim: int, strides: tuple[int, ...], shared: dict) -> nnx.Module:
    encoder = dict(encoder)
    kind = encoder.pop("kind", None)
    check_choice("config.model.encoder.kind", kind, ("attention", "convolution"))
    if kind == "attention":
        attention = build_part(AttentionFields, "config.model.encoder", encoder)
        return AttentionEncoder(dim, attention, num_levels=len(strides), **shared)
    convolution = build_part(ConvolutionFields, "config.model.encoder", encoder)
    return ConvolutionEncoder(dim, convolution, strides=strides, **shared)

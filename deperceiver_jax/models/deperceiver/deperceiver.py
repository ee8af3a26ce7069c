"""DePerceiver: a ResNet, Perceiver IO in place of DETR's transformer, and DETR's heads.

Source: the paper (Li and Kannan, 2021) and its released code, whose quirks are values of the config's fields.
"""

from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.field_needs import Need, at_least, equal
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.deperceiver.perceiver_io import (
    DecoderFields,
    EncoderFields,
    PerceiverDecoder,
    PerceiverEncoder,
)
from deperceiver_jax.models.deperceiver.token_levels import TokenLevels
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.heads.heads import PredictionHeads
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.linear import split_key
from deperceiver_jax.structures import Predictions


class DePerceiver(Detector):
    """image -> ResNet features -> tokens -> latents -> decoded queries -> Predictions.

    Without decoder layers the latents are the queries. `relative_boxes`: centres are offsets from the queries' anchors.
    """

    needs = {
        "model.position.fourier_bands": equal("model.position.encoding", "fourier"),
        "model.position.learned_size": equal("model.position.encoding", "learned"),
        "model.level_dim": Need(lambda config: len(config.model.strides) > 1, "two or more config.model.strides"),
        "model.encoder.share_blocks": at_least("model.encoder.num_blocks", 2),
        "model.encoder.anchor_width": equal("model.encoder.anchors", True),
        "model.decoder.self_attention_value": equal("model.decoder.self_attention", True),
        "model.decoder.self_heads": equal("model.decoder.self_attention", True),
        "model.decoder.anchors": Need(
            lambda config: config.model.encoder.anchors or config.model.relative_boxes,
            "config.model.encoder.anchors=True or config.model.relative_boxes=True",
        ),
        "model.decoder.anchor_width": Need(
            lambda config: config.model.encoder.anchors and config.model.decoder.anchors,
            "config.model.encoder.anchors=True and config.model.decoder.anchors=True",
        ),
        **{
            f"model.decoder.{field}": at_least("model.decoder.num_layers", 1)
            for field in ("self_attention", "residual", "cross_heads", "mlp_ratio", "dropout")
        },
        "loss.auxiliary": at_least("model.decoder.num_layers", 2),
    }

    def __init__(
        self,
        fields: DetectorFields,
        *,
        relative_boxes: bool,
        level_dim: int,
        position: dict,
        encoder: dict,
        decoder: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        encoder = build_part(EncoderFields, "config.model.encoder", encoder)
        decoder = build_part(DecoderFields, "config.model.decoder", decoder)
        _check(fields, encoder, decoder, relative_boxes)
        super().__init__(fields, compute=compute, rngs=rngs)
        self.relative_boxes = relative_boxes
        dim = fields.embed_dim
        self.levels = TokenLevels(
            self.backbone.channels,
            strides=self.strides,
            width=dim,
            level_dim=level_dim,
            position=position,
            compute=compute,
            rngs=rngs,
        )
        self.encoder = PerceiverEncoder(dim, encoder, dropout=fields.dropout, compute=compute, rngs=rngs)
        self.decoder = PerceiverDecoder(
            dim,
            encoder.latent_dim,
            fields.num_queries,
            decoder,
            latents_have_places=encoder.anchors,
            compute=compute,
            rngs=rngs,
        )
        self.heads = PredictionHeads(dim, fields.num_logits, rngs=rngs)

    def predict(self, image, pixel_valid, dropout_key) -> Predictions:
        key_encoder, key_decoder = split_key(dropout_key, 2)
        tokens = self.levels(self.backbone(image, pixel_valid), pixel_valid)
        latents = self.encoder(tokens, dropout_key=key_encoder)
        places = None if self.encoder.anchors is None else self.encoder.anchors()
        decoded = self.decoder(latents, places, dropout_key=key_decoder)
        return self.heads(decoded, self.decoder.anchors.logits[...] if self.relative_boxes else None)


def _check(fields: DetectorFields, encoder: EncoderFields, decoder: DecoderFields, relative_boxes: bool) -> None:
    """Refuses a decoder without anchors or queries where something needs them."""
    if relative_boxes and not decoder.anchors:
        raise UserError("config.model.relative_boxes needs config.model.decoder.anchors, which is off.")
    if decoder.num_layers:
        return
    if (encoder.num_latents, encoder.latent_dim) != (fields.num_queries, fields.embed_dim):
        raise UserError(
            "config.model.decoder.num_layers is 0, so the latents are the queries, but config.model.encoder has "
            f"{encoder.num_latents} latents of {encoder.latent_dim} channels and there are {fields.num_queries} "
            f"queries of {fields.embed_dim}."
        )
    if relative_boxes:
        raise UserError("config.model.relative_boxes needs config.model.decoder.num_layers of at least 1.")

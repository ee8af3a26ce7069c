"""DETR: a ResNet, a transformer over its last feature map, and heads that answer for each object query.

Source: Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872.
"""

from flax import nnx
from jaxtyping import Array

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.field_needs import Need, at_least, equal
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.detr.transformer import TransformerDecoder, TransformerEncoder
from deperceiver_jax.models.features.position_encoding import PositionEncoding
from deperceiver_jax.models.features.tokens import feature_valid, flatten_map
from deperceiver_jax.models.heads.heads import PredictionHeads
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.linear import linear, split_key
from deperceiver_jax.structures import Predictions

WHERE = ("attention", "input", "none")


class DETR(Detector):
    """image -> ResNet features -> tokens -> memory -> decoded queries -> Predictions of every decoder layer.

    Where the position encoding enters is a field for each half (the paper's Table 3): `attention` adds it to queries
    and keys of every layer, `input` once to the tokens (encoder) or the memory (decoder), `none` nowhere.
    """

    needs = {
        "model.position.encoding": Need(
            lambda config: (config.model.position.encoder, config.model.position.decoder) != ("none", "none"),
            "config.model.position.encoder=attention",
        ),
        "model.position.fourier_bands": equal("model.position.encoding", "fourier"),
        "model.position.learned_size": equal("model.position.encoding", "learned"),
        "model.encoder.num_heads": at_least("model.encoder.num_layers", 1),
        "model.encoder.mlp_dim": at_least("model.encoder.num_layers", 1),
        "loss.auxiliary": at_least("model.decoder.num_layers", 2),
    }

    def __init__(
        self,
        fields: DetectorFields,
        *,
        pre_norm: bool,
        position: dict,
        encoder: dict,
        decoder: dict,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        dim, position = fields.embed_dim, dict(position)
        if len(fields.strides) != 1:
            raise UserError(f"config.model.strides is {tuple(fields.strides)}; DETR looks at one feature map.")
        if dim % 2:
            raise UserError(f"config.model.embed_dim is {dim}; half of it encodes rows, so it must be even.")
        super().__init__(fields, compute=compute, rngs=rngs)
        self.position_in_encoder, self.position_in_decoder = (position.pop(half) for half in ("encoder", "decoder"))
        check_choice("config.model.position.encoder", self.position_in_encoder, WHERE)
        check_choice("config.model.position.decoder", self.position_in_decoder, WHERE)
        self.projection = linear(self.backbone.channels[self.strides[0]], dim, dtype=compute.dtype, rngs=rngs)
        self.position = build_part(
            PositionEncoding, "config.model.position", position, dim, dtype=compute.dtype, rngs=rngs
        )
        shared = dict(pre_norm=pre_norm, dropout=fields.dropout, compute=compute, rngs=rngs)
        self.encoder = build_part(TransformerEncoder, "config.model.encoder", encoder, dim, **shared)
        self.decoder = build_part(
            TransformerDecoder, "config.model.decoder", decoder, dim, fields.num_queries, **shared
        )
        self.heads = PredictionHeads(dim, fields.num_logits, rngs=rngs)

    def predict(self, image, pixel_valid, dropout_key) -> Predictions:
        key_encoder, key_decoder = split_key(dropout_key, 2)
        features = self.projection(self.backbone(image, pixel_valid)[self.strides[0]])
        map_valid = feature_valid(pixel_valid, *features.shape[1:3])
        position = flatten_map(self.position(map_valid).astype(features.dtype))
        token_valid = map_valid.reshape(map_valid.shape[0], -1)

        tokens, at_attention = _place(self.position_in_encoder, flatten_map(features), position)
        memory = self.encoder(tokens, at_attention, token_valid, dropout_key=key_encoder)
        memory, at_attention = _place(self.position_in_decoder, memory, position)
        return self.heads(self.decoder(memory, at_attention, token_valid, dropout_key=key_decoder))


def _place(where: str, x: Array, position: Array) -> tuple[Array, Array | None]:
    """(x with the position if it enters here, the position that every attention gets or None)."""
    return x + position if where == "input" else x, position if where == "attention" else None

"""DETR: a ResNet, a transformer over its last feature map, and heads that answer for each object query.

Source: Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872.
"""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.heads import PredictionHeads
from deperceiver_jax.models.linear import linear, split_key
from deperceiver_jax.models.position_encoding import PositionEncoding
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.tokens import feature_valid, flatten_map
from deperceiver_jax.models.transformer import TransformerDecoder, TransformerEncoder
from deperceiver_jax.structures import Predictions


class DETR(nnx.Module):
    """image -> ResNet features -> tokens -> memory -> decoded queries -> Predictions of every decoder layer.

    Where the position encoding enters is a field for each half (the paper's Table 3): `attention` adds it to queries
    and keys of every layer, `input` once to the tokens (encoder) or the memory (decoder), `none` nowhere.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_logit: bool,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        pre_norm: bool,
        stride: int,
        backbone: dict,
        position: dict,
        encoder: dict,
        decoder: dict,
        dtype,
        rngs: nnx.Rngs,
    ):
        _check(position, embed_dim)
        self.stride = stride
        self.position_in_encoder, self.position_in_decoder = position["encoder"], position["decoder"]
        self.backbone = ResNet(**backbone, strides=(stride,), dtype=dtype, rngs=rngs)
        self.projection = linear(self.backbone.channels[stride], embed_dim, dtype=dtype, rngs=rngs)
        self.position = PositionEncoding(
            position["encoding"],
            embed_dim,
            fourier_bands=position["fourier_bands"],
            learned_size=position["learned_size"],
            project_fourier=True,
            dtype=dtype,
            rngs=rngs,
        )
        shared = dict(pre_norm=pre_norm, dropout=dropout, dtype=dtype, rngs=rngs)
        self.encoder = TransformerEncoder(embed_dim, **encoder, **shared)
        self.decoder = TransformerDecoder(embed_dim, num_queries, **decoder, **shared)
        self.heads = PredictionHeads(embed_dim, num_classes + int(no_object_logit), rngs=rngs)

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Pixels between the cells of each map that becomes tokens, in the order of the tokens."""
        return (self.stride,)

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        pixel_valid: Bool[Array, "B H W"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py."""
        key_encoder, key_decoder = split_key(dropout_key, 2)
        features = self.projection(self.backbone(image, pixel_valid)[self.stride])
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


def _check(position: dict, embed_dim: int) -> None:
    for half in ("encoder", "decoder"):
        if position[half] not in ("attention", "input", "none"):
            raise UserError(f"config.model.position.{half} is {position[half]!r}; it can be attention, input or none.")
    if embed_dim % 2:
        raise UserError(f"config.model.embed_dim is {embed_dim}; half of it encodes rows, so it must be even.")

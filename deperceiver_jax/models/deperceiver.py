"""DePerceiver: a ResNet, Perceiver IO in place of DETR's transformer, and DETR's heads.

Source: the paper (Li and Kannan, 2021) and its released code, whose quirks are values of the config's fields.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.heads import PredictionHeads
from deperceiver_jax.models.linear import linear, split_key
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.perceiver_io import PerceiverDecoder, PerceiverEncoder
from deperceiver_jax.models.position_encoding import PositionEncoding
from deperceiver_jax.models.resnet import ResNet
from deperceiver_jax.models.tokens import cell_places, concatenate_levels, feature_valid, flatten_map, size_in_cells
from deperceiver_jax.structures import Predictions


class TokenLevels(nnx.Module):
    """Feature maps of one or more strides -> one row of tokens with positions.

    Each map is projected by a 1x1 convolution and gets its position encoding. With several levels, a learned vector
    tells them apart: `concat` gives its channels a place of their own, `add` adds it to the position.
    """

    def __init__(
        self,
        channels: dict[int, int],
        *,
        strides: tuple[int, ...],
        width: int,
        position: dict,
        embedding: str,
        embed_dim: int,
        group_norm: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        """`width` is that of the tokens before positions are concatenated; `embed_dim` the embedding's part of it."""
        if embedding not in ("concat", "add"):
            raise UserError(f"config.model.levels.embedding is {embedding!r}; it can be concat or add.")
        use, position = position["use"], {name: value for name, value in position.items() if name != "use"}
        if use not in ("add", "keys", "concat"):
            raise UserError(f"config.model.position.use is {use!r}; it can be add, keys or concat.")
        several = len(strides) > 1
        level_dim = embed_dim if several and embedding == "concat" else 0
        self.strides = tuple(strides)
        self.use = use
        self.level_dim = level_dim
        dim = width - level_dim
        self.projections = nnx.List([linear(channels[s], dim, dtype=dtype, rngs=rngs) for s in strides])
        if group_norm and dim % 32:
            raise UserError(f"config.model.levels.group_norm needs a width that 32 divides; the levels have {dim}.")
        norms = [nnx.GroupNorm(dim, 32, epsilon=1e-5, dtype=dtype, rngs=rngs) for _ in strides if group_norm]
        self.norms = nnx.List(norms)
        self.position = build_part(
            PositionEncoding,
            "config.model.position",
            position,
            dim=dim,
            project_fourier=use != "concat",
            dtype=dtype,
            rngs=rngs,
        )
        tags = (len(strides), level_dim or self.position.dim)
        self.level_embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), tags)) if several else None
        self.token_dim = width + (self.position.dim if self.use == "concat" else 0)

    def __call__(self, features: dict[int, Array], pixel_valid: Bool[Array, "B H W"]):
        """(tokens [B,M,token_dim], token_valid [B,M], key_position or None, token_place [B,M,2]).

        `key_position` [B,M,token_dim] is None where positions are in the tokens; for `token_place` see tokens.py.
        """
        tokens, valid, key_position, places = [], [], [], []
        extent = size_in_cells(pixel_valid, self.strides)
        for level, stride in enumerate(self.strides):
            x = self.projections[level](features[stride])
            if self.norms:
                x = self.norms[level](x)
            map_valid = feature_valid(pixel_valid, *x.shape[1:3])
            position = self.position(map_valid)
            tag = None if self.level_embedding is None else self.level_embedding[level]
            if tag is not None and not self.level_dim:
                position = position + tag[None, None, None, :]
            position = position.astype(x.dtype)
            if self.use == "add":
                x = x + position
            elif self.use == "concat":
                x = jnp.concatenate([x, position], axis=-1)
            if self.level_dim:
                shape = (*x.shape[:-1], self.level_dim)
                x = jnp.concatenate([x, jnp.broadcast_to(tag.astype(x.dtype), shape)], axis=-1)
                position = jnp.concatenate([position, jnp.zeros(shape, x.dtype)], axis=-1)
            tokens.append(flatten_map(x))
            valid.append(map_valid.reshape(map_valid.shape[0], -1))
            key_position.append(flatten_map(position))
            places.append(cell_places(*x.shape[1:3], extent[:, level]))
        position = concatenate_levels(key_position) if self.use == "keys" else None
        return concatenate_levels(tokens), concatenate_levels(valid), position, concatenate_levels(places)


class DePerceiver(nnx.Module):
    """image -> ResNet features -> tokens -> latents -> decoded queries -> Predictions.

    Without decoder layers the latents are the queries.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_logit: bool,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        strides: tuple[int, ...],
        backbone: dict,
        position: dict,
        levels: dict,
        encoder: dict,
        decoder: dict,
        relative_boxes: bool,
        read_tokens: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        if relative_boxes and not decoder["anchors"]:
            raise UserError("config.model.relative_boxes needs config.model.decoder.anchors, which is off.")
        self.relative_boxes = relative_boxes
        self.read_tokens = read_tokens
        self.backbone = build_part(
            ResNet, "config.model.backbone", backbone, strides=tuple(strides), dtype=dtype, rngs=rngs
        )
        self.levels = build_part(
            TokenLevels,
            "config.model.levels",
            levels,
            channels=self.backbone.channels,
            strides=strides,
            width=embed_dim,
            position=position,
            dtype=dtype,
            rngs=rngs,
        )
        self.encoder = build_part(
            PerceiverEncoder,
            "config.model.encoder",
            encoder,
            token_dim=self.levels.token_dim,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )
        if self.read_tokens and self.levels.token_dim != encoder["latent_dim"]:
            raise UserError(
                f"config.model.read_tokens needs latents as wide as the tokens, which have "
                f"{self.levels.token_dim} channels; config.model.encoder.latent_dim is {encoder['latent_dim']}."
            )
        self.decoder = build_part(
            PerceiverDecoder,
            "config.model.decoder",
            decoder,
            dim=embed_dim,
            latent_dim=encoder["latent_dim"],
            num_queries=num_queries,
            latents_have_places=encoder["anchors"],
            dtype=dtype,
            rngs=rngs,
        )
        if self.decoder.layers is None:
            _check_that_latents_answer(num_queries, embed_dim, encoder, relative_boxes or read_tokens)
        self.heads = PredictionHeads(embed_dim, num_classes + int(no_object_logit), rngs=rngs)

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Pixels between the cells of each map that becomes tokens, in the order of the tokens."""
        return self.levels.strides

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
        tokens, token_valid, key_position, token_place = self.levels(features, pixel_valid)
        latents = self.encoder(tokens, token_valid, key_position, token_place, dropout_key=key_encoder)
        place = None if self.encoder.anchors is None else self.encoder.anchors()[None]
        if not self.read_tokens:
            decoded = self.decoder(latents, place, dropout_key=key_decoder)
        else:
            if place is not None:
                place = jnp.broadcast_to(place, (len(latents), *place.shape[1:]))
                place = jnp.concatenate([place, token_place], axis=1)
            valid = jnp.concatenate([jnp.ones(latents.shape[:2], bool), token_valid], axis=1)
            key_position = None if key_position is None else jnp.concatenate([0 * latents, key_position], axis=1)
            both = jnp.concatenate([latents, tokens], axis=1)
            decoded = self.decoder(both, place, valid, key_position, dropout_key=key_decoder)
        return self.heads(decoded, self.decoder.anchors() if self.relative_boxes else None)


def _check_that_latents_answer(num_queries: int, dim: int, encoder: dict, needs_queries: bool) -> None:
    """Refuses what needs a decoder's queries where there are none."""
    latents = (encoder["num_latents"], encoder["latent_dim"])
    if latents != (num_queries, dim):
        raise UserError(
            "config.model.decoder.num_layers is 0, so the latents are the queries, but config.model.encoder has "
            f"{latents[0]} latents of {latents[1]} channels and there are {num_queries} queries of {dim}."
        )
    if needs_queries:
        raise UserError(
            "config.model.relative_boxes and read_tokens need config.model.decoder.num_layers of at least 1."
        )

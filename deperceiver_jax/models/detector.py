"""What all detectors are: a ResNet, something that turns its features into answers, and one way to call them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError, check_at_least, check_fraction
from deperceiver_jax.field_needs import Need
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.features.resnet import ResNet
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.structures import Predictions, Targets


@dataclass(frozen=True)
class DetectorFields:
    """The fields of config.model that every family has."""

    num_classes: int  # class slots
    no_object_logit: bool  # one more logit after the class slots
    num_queries: int
    embed_dim: int  # width of tokens and queries
    dropout: float
    strides: Sequence[int]  # of the backbone's features that are looked at
    backbone: Mapping[str, object]

    def __post_init__(self):
        for name in ("num_classes", "num_queries", "embed_dim"):
            check_at_least(f"config.model.{name}", getattr(self, name), 1)
        check_fraction("config.model.dropout", self.dropout)
        if not self.strides:
            raise UserError("config.model.strides is (); it must name at least one.")

    @property
    def num_logits(self) -> int:
        return self.num_classes + int(self.no_object_logit)


class Detector(nnx.Module):
    """`detector(image, pixel_valid) -> Predictions` of every decoder layer; the last one is the answer.

    A family makes its parts behind `self.backbone` and says in `predict` how they follow one another.
    """

    needs: ClassVar[Mapping[str, Need]] = {}  # see field_needs.py

    def __init__(
        self, fields: DetectorFields, *, backbone_strides: Sequence[int] = (), compute: Compute, rngs: nnx.Rngs
    ):
        self.strides = tuple(sorted(fields.strides))
        self.dtype = compute.dtype
        strides = tuple(backbone_strides) or self.strides
        self.backbone = build_part(
            ResNet, "config.model.backbone", fields.backbone, strides=strides, compute=compute, rngs=rngs
        )

    @property
    def token_strides(self) -> tuple[int, ...]:
        """Pixels between the cells of each map that becomes tokens, in the order of the tokens."""
        return self.strides

    @property
    def fewest_tokens(self) -> int:
        """That an image must have; as many as there are queries where each of these starts from a token."""
        return 1

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        pixel_valid: Bool[Array, "B H W"],
        *,
        targets: Targets | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Predictions:
        """`image` has ImageNet's mean and standard deviation removed and zeros on padding; see images.py.

        targets: what is in the images, which every training step hands over. Most detectors learn from the loss alone
        and do not look at it, as this method; one that trains on denoising queries makes them of it.
        """
        del targets
        return self.predict(image, pixel_valid, dropout_key)

    def predict(
        self, image: Float[Array, "B H W 3"], pixel_valid: Bool[Array, "B H W"], dropout_key: jax.Array | None
    ) -> Predictions:
        raise NotImplementedError

"""Decoded queries -> class logits and boxes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.linear import linear
from deperceiver_jax.models.mlp import MLP
from deperceiver_jax.structures import Predictions


class ClassHead(nnx.Module):
    """One linear layer; in float32 whatever the rest computes in."""

    def __init__(self, dim: int, num_logits: int, *, rngs: nnx.Rngs):
        self.linear = linear(dim, num_logits, dtype=jnp.float32, rngs=rngs)

    def __call__(self, decoded: Float[Array, "... D"]) -> Float[Array, "... C"]:
        return self.linear(decoded)


class BoxHead(nnx.Module):
    """A three-layer MLP whose sigmoid is cxcywh in [0, 1] of the unpadded image; in float32.

    With a reference (x, y), its logit is added to the centre's: the MLP answers an offset (Deformable DETR, eq. 9). A
    `center_logit` is such a logit itself.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.mlp = MLP([dim, dim, dim, 4], activation=jax.nn.relu, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        decoded: Float[Array, "L B Q D"],
        reference: Float[Array, "Q 2"] | None = None,
        *,
        center_logit: Float[Array, "Q 2"] | None = None,
    ) -> Float[Array, "L B Q 4"]:
        boxes = self.mlp(decoded)
        if reference is not None:
            center_logit = jnp.log(reference) - jnp.log1p(-reference)
        if center_logit is not None:
            boxes = boxes + jnp.pad(center_logit, ((0, 0), (0, 2)))[None, None]
        return jax.nn.sigmoid(boxes)


class PredictionHeads(nnx.Module):
    """The class head and the box head, shared by all decoder layers."""

    def __init__(self, dim: int, num_logits: int, *, rngs: nnx.Rngs):
        self.class_head = ClassHead(dim, num_logits, rngs=rngs)
        self.box_head = BoxHead(dim, rngs=rngs)

    def __call__(
        self, decoded: Float[Array, "L B Q D"], reference: Float[Array, "Q 2"] | None = None, **center
    ) -> Predictions:
        return Predictions(logits=self.class_head(decoded), boxes=self.box_head(decoded, reference, **center))

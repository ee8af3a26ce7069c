"""Decoded queries -> class logits and boxes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.layers.activations import relu
from deperceiver_jax.models.layers.compute import EXACT
from deperceiver_jax.models.layers.linear import linear
from deperceiver_jax.models.layers.mlp import MLP
from deperceiver_jax.structures import Predictions

CLASS_HEAD = "class_head"  # a part of the path of every parameter whose meaning depends on the class map
BOX_DELTAS = ("scaled", "logits")
LARGEST_GROWTH = math.log(1000 / 16)  # of a side, as an exponent; Detectron's bound
RARE = -math.log(99)  # the logit of 1 %: focal losses start with classes that are seldom there


def inverse_sigmoid(x: Array) -> Array:
    """log(x / (1 - x)), with x and 1 - x kept from falling under 1e-5: within +-11.5."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, 1e-5) / jnp.maximum(1.0 - x, 1e-5))


def _with_barrier(x: Array, kernel: Array, *dimensions, **options) -> Array:
    """lax.dot_general, whose gradient libtpu 0.0.51 can sum over several slices, also that of a stack of kernels."""
    return jax.lax.dot_general(x, jax.lax.optimization_barrier(kernel), *dimensions, **options)


class ClassHead(nnx.Module):
    """One linear layer, in float32. With `rare`, every class starts at a probability of 1 %."""

    def __init__(self, dim: int, num_logits: int, *, rare: bool = False, rngs: nnx.Rngs):
        self.linear = linear(dim, num_logits, **EXACT, dot_general=_with_barrier, rngs=rngs)
        if rare:
            self.linear.bias[...] = RARE

    def __call__(self, decoded: Float[Array, "... D"]) -> Float[Array, "... C"]:
        return self.linear(decoded)


class BoxHead(nnx.Module):
    """A three-layer MLP whose sigmoid is cxcywh in [0, 1] of the unpadded image; in float32."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.mlp = MLP([dim, dim, dim, 4], activation=relu, **EXACT, rngs=rngs)

    def __call__(
        self, decoded: Float[Array, "L B Q D"], center_logit: Float[Array, "Q 2"] | None = None
    ) -> Float[Array, "L B Q 4"]:
        """`center_logit`: of each query's reference point (x, y); the MLP then answers an offset from it."""
        boxes = self.mlp(decoded)
        if center_logit is not None:
            boxes = boxes + jnp.pad(center_logit, ((0, 0), (0, 2)))[None, None]
        return jax.nn.sigmoid(boxes)


class PredictionHeads(nnx.Module):
    """The class head and the box head, shared by all decoder layers."""

    def __init__(self, dim: int, num_logits: int, *, rare: bool = False, rngs: nnx.Rngs):
        self.class_head = ClassHead(dim, num_logits, rare=rare, rngs=rngs)
        self.box_head = BoxHead(dim, rngs=rngs)

    def __call__(
        self, decoded: Float[Array, "L B Q D"], center_logit: Float[Array, "Q 2"] | None = None
    ) -> Predictions:
        return Predictions(logits=self.class_head(decoded), boxes=self.box_head(decoded, center_logit))


class RelativeHeads(nnx.Module):
    """Class logits, and boxes relative to reference boxes (cxcywh): the box head answers their deltas (`move_boxes`).

    Classes start at a probability of 1 %, boxes at their references; `size_bias` is what the deltas of the sizes start
    at. With deltas of logits, a reference of size 0.5 moves the centre alone: its logit is 0.
    """

    def __init__(
        self, dim: int, num_logits: int, *, size_bias: float = 0.0, box_deltas: str = "logits", rngs: nnx.Rngs
    ):
        self.box_deltas = box_deltas
        self.class_head = ClassHead(dim, num_logits, rare=True, rngs=rngs)
        self.box_head = BoxHead(dim, rngs=rngs)
        last = self.box_head.mlp.layers[-1]
        last.kernel[...] = 0.0
        last.bias[...] = np.array([0.0, 0.0, size_bias, size_bias], np.float32)

    def __call__(self, decoded: Float[Array, "*L B Q D"], reference: Float[Array, "*L B Q 4"]) -> Predictions:
        return Predictions(logits=self.class_head(decoded), boxes=self.move(reference, self.box_head.mlp(decoded)))

    def move(self, reference: Float[Array, "*L B Q 4"], deltas: Float[Array, "*L B Q 4"]) -> Float[Array, "*L B Q 4"]:
        return move_boxes(reference, deltas, self.box_deltas)


def move_boxes(
    reference: Float[Array, "*L B Q 4"], deltas: Float[Array, "*L B Q 4"], box_deltas: str
) -> Float[Array, "*L B Q 4"]:
    """Boxes (cxcywh) that lie `deltas` from `reference`, in one of BOX_DELTAS.

    `logits` adds them to the logits of all four numbers (Deformable DETR), so the same delta moves a box in a corner
    less than one in the middle, and a small one as far as a large one. `scaled` are shares of the reference's own sides
    for the centre and exponents for the sides, at most LARGEST_GROWTH (R-CNN, arXiv:1311.2524, appendix C): what they
    mean depends on neither place nor size. Boxes may reach beyond the image.
    """
    if box_deltas == "logits":
        return jax.nn.sigmoid(deltas + inverse_sigmoid(reference))
    center, size = jnp.split(reference, 2, axis=-1)
    shift, growth = jnp.split(deltas, 2, axis=-1)
    return jnp.concatenate([center + shift * size, size * jnp.exp(jnp.minimum(growth, LARGEST_GROWTH))], axis=-1)


def no_predictions(batch: int, num_queries: int, num_logits: int) -> Predictions:
    """What decoder layers that answer are handed before the first of them."""
    logits, boxes = ((batch, num_queries, width) for width in (num_logits, 4))
    return Predictions(jnp.zeros(logits, jnp.float32), jnp.zeros(boxes, jnp.float32))

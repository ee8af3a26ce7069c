"""What the class logits mean: their width, matching cost, loss and scores, kept together for each of the readings.

DETR and DePerceiver choose one of the classes or "no object" by softmax; Deformable DETR and SMCA ask of every class
on its own by sigmoid, and DePerceiver+ besides how well the box lies. All of it is computed in float32, whatever type
the logits come in.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.errors import UserError, check_at_least, check_between, check_choice


@dataclass(frozen=True)
class SoftmaxNoObject:
    """One of the classes or, as the last logit, no object. Source: DETR (arXiv:2005.12872), section 3."""

    no_object_weight: float  # of an unmatched query in the loss; a matched one weighs 1
    name = "ce"
    asks_overlap = False
    has_no_object = True

    def __post_init__(self):
        check_at_least("config.loss.no_object_weight", self.no_object_weight, 0)

    def check_width(self, num_logits: int, num_classes: int) -> None:
        """The last logit must stand behind all classes, else it would take one of them for no object."""
        if num_logits != num_classes + 1:
            raise UserError(
                f"config.loss.classification softmax_no_object needs {num_classes + 1} logits, one more than the "
                f"{num_classes} classes, but the model has {num_logits}; see config.model.no_object_logit."
            )

    def cost(self, logits: Float[Array, "L B Q C"], labels: Int32[Array, "B N"]) -> Float[Array, "L B Q N"]:
        """Minus the probability of each box's class; DETR's approximation of the loss, bounded like the box costs."""
        return -_at_labels(jax.nn.softmax(logits.astype(jnp.float32)), labels)

    def normalizer(self, box_valid: Bool[Array, "B N"], num_queries: int) -> Float[Array, ""]:
        """Sum of the weights of all queries of these images; it needs no matching, which pairs all that can be paired.

        DETR's processes each divide by their own sum and average the quotients; here there is one quotient over the
        global batch, however many devices share it.
        """
        num_matched = jnp.sum(jnp.minimum(jnp.sum(box_valid, axis=1), num_queries))
        num_unmatched = box_valid.shape[0] * num_queries - num_matched
        # Zero only when unmatched queries weigh nothing and there is no box: no loss then, not 0/0.
        return jnp.maximum(num_matched + self.no_object_weight * num_unmatched, jnp.finfo(jnp.float32).tiny)

    def loss(
        self,
        logits: Float[Array, "L B Q C"],
        target_labels: Int32[Array, "L B Q"],
        normalizer: Float[Array, ""],
        counted: Bool[Array, "B Q"] | None = None,
    ) -> Float[Array, " L"]:
        """Weighted cross-entropy summed over all queries that are `counted`; `target_labels` -1 is no object."""
        logits = logits.astype(jnp.float32)
        matched = target_labels >= 0
        target = jnp.where(matched, target_labels, logits.shape[-1] - 1)
        chosen = jnp.sum(jnp.where(_one_hot(target, logits.shape[-1]), logits, 0.0), axis=-1)
        cross_entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
        weight = jnp.where(matched, 1.0, self.no_object_weight)
        if counted is not None:
            weight = jnp.where(counted[None], weight, 0.0)
        return jnp.sum(weight * cross_entropy, axis=(1, 2)) / normalizer

    def scores(self, logits: Float[Array, "B Q C"]) -> Float[Array, "B Q C-1"]:
        """Class probabilities. No object leaves after the softmax: a query that prefers it keeps its small scores."""
        return jax.nn.softmax(logits.astype(jnp.float32))[..., :-1]

    def detect(
        self, logits: Float[Array, "B Q C"], k: int
    ) -> tuple[Float[Array, "B K"], Int32[Array, "B K"], Int32[Array, "B K"]]:
        """Each query's best class, best query first: scores, class slots, queries; K = min(k, Q)."""
        scores = self.scores(logits)
        labels = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        best, query = jax.lax.top_k(jnp.max(scores, axis=-1), min(k, logits.shape[1]))
        return best, jnp.take_along_axis(labels, query, axis=1), query


@dataclass(frozen=True)
class _Sigmoid:
    """Every class on its own. Logits behind the classes are legal: they are classes that never occur (SMCA has 92
    logits for 91 slots)."""

    alpha: float
    gamma: float  # how fast the loss of easy logits fades
    name: ClassVar[str]
    has_no_object: ClassVar[bool] = False

    def __post_init__(self):
        check_between("config.loss.focal_alpha", self.alpha, 0, 1)
        check_at_least("config.loss.focal_gamma", self.gamma, 0)

    def check_width(self, num_logits: int, num_classes: int) -> None:
        """Every class needs a logit."""
        if num_logits < num_classes:
            raise UserError(
                f"config.loss.classification sigmoid_{self.name} needs a logit for each of the {num_classes} classes, "
                f"but the model has {num_logits}."
            )

    def cost(self, logits: Float[Array, "L B Q C"], labels: Int32[Array, "B N"]) -> Float[Array, "L B Q N"]:
        """Focal loss of "this class is here" minus that of "it is not", at each box's class.

        Always with alpha 0.25 and gamma 2, as Deformable DETR's matcher, so the two loss settings change only the loss.
        The epsilon of 1e-8 is theirs: it bounds the logarithm of a saturated sigmoid.
        """
        logits = logits.astype(jnp.float32)
        # Not 1 - probability: in 1 - probability + 1e-8 XLA adds the two constants first, and the 1e-8 is gone.
        probability, absent = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
        cost_present = 0.25 * absent**2 * -jnp.log(probability + 1e-8)
        cost_absent = 0.75 * probability**2 * -jnp.log(absent + 1e-8)
        return _at_labels(cost_present - cost_absent, labels)

    def normalizer(self, box_valid: Bool[Array, "B N"], num_queries: int) -> Float[Array, ""]:
        """The number of boxes in these images, at least 1."""
        del num_queries
        return jnp.maximum(jnp.sum(box_valid, dtype=jnp.float32), 1.0)

    def scores(self, logits: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        """Probability of each class on its own; they do not sum to 1."""
        return jax.nn.sigmoid(logits.astype(jnp.float32))

    def detect(
        self, logits: Float[Array, "B Q C"], k: int
    ) -> tuple[Float[Array, "B K"], Int32[Array, "B K"], Int32[Array, "B K"]]:
        """The best (query, class) pairs, best first: scores, class slots, queries; K = min(k, Q C).

        A query may appear several times, with different classes.
        """
        num_logits = logits.shape[-1]
        flat = self.scores(logits).reshape(logits.shape[0], -1)
        best, index = jax.lax.top_k(flat, min(k, flat.shape[1]))
        return best, index % num_logits, index // num_logits


@dataclass(frozen=True)
class SigmoidFocal(_Sigmoid):
    """Every class on its own, trained with the focal loss (arXiv:1708.02002). Source: Deformable DETR.

    `alpha` is the weight of the true class; all others weigh 1 - alpha.
    """

    name = "focal"
    asks_overlap = False

    def loss(
        self,
        logits: Float[Array, "L B Q C"],
        target_labels: Int32[Array, "L B Q"],
        normalizer: Float[Array, ""],
        counted: Bool[Array, "B Q"] | None = None,
    ) -> Float[Array, " L"]:
        """Focal loss summed over all queries that are `counted` and all logits; `target_labels` -1 has no class.

        alpha_t (1 - p_t)^gamma (-log p_t), with p_t = sigmoid(logit) for the true class and sigmoid(-logit) for every
        other. Both factors come from log-sigmoids, so values and gradients stay finite for any finite logit and gamma.
        """
        logits = logits.astype(jnp.float32)
        present = _one_hot(target_labels, logits.shape[-1])
        toward = jnp.where(present, logits, -logits)
        modulator = jnp.exp(self.gamma * jax.nn.log_sigmoid(-toward))
        weight = jnp.where(present, self.alpha, 1.0 - self.alpha)
        return _total(weight * modulator * -jax.nn.log_sigmoid(toward), counted) / normalizer


@dataclass(frozen=True)
class SigmoidIoUAware(_Sigmoid):
    """Every class on its own, whose probability a matched query learns to be high where its box lies well, too.

    Scores then rank boxes by where they lie besides what they hold. Source: Cai et al., "Align-DETR"
    (arXiv:2304.07527), section 3.2, and its released code; `alpha` is the share of the probability in the target.
    """

    name = "iou_aware"
    asks_overlap = True

    def loss(
        self,
        logits: Float[Array, "L B Q C"],
        target_labels: Int32[Array, "L B Q"],
        normalizer: Float[Array, ""],
        counted: Bool[Array, "B Q"] | None = None,
        *,
        overlap: Float[Array, "L B Q"],
    ) -> Float[Array, " L"]:
        """Binary cross-entropy summed over all queries that are `counted` and all logits.

        The target of the true class is t = p^alpha IoU^(1 - alpha), at least 0.01, without gradient; p is its
        probability, and `overlap` the IoU of the query's box with its target. Other logits have the target 0, weighed
        by p^gamma. `target_labels` -1 has no class, and its overlap no meaning.
        """
        logits = logits.astype(jnp.float32)
        present = _one_hot(target_labels, logits.shape[-1])
        log_probability = jax.nn.log_sigmoid(logits)
        aligned = jnp.exp(self.alpha * log_probability) * overlap[..., None] ** (1.0 - self.alpha)
        target = jax.lax.stop_gradient(jnp.where(present, jnp.maximum(aligned, 0.01), 0.0))
        absent = jnp.where(present, 1.0 - target, jnp.exp(self.gamma * log_probability))
        loss = -target * log_probability - absent * jax.nn.log_sigmoid(-logits)
        return _total(loss, counted) / normalizer


Classification = SoftmaxNoObject | SigmoidFocal | SigmoidIoUAware
SIGMOID: dict[str, type[SigmoidFocal] | type[SigmoidIoUAware]] = {
    "sigmoid_focal": SigmoidFocal,
    "sigmoid_iou_aware": SigmoidIoUAware,
}


def build_classification(config) -> Classification:
    """The reading that `config.loss` names."""
    check_choice("config.loss.classification", config.classification, ("softmax_no_object", *SIGMOID))
    if config.classification in SIGMOID:
        return SIGMOID[config.classification](alpha=config.focal_alpha, gamma=config.focal_gamma)
    return SoftmaxNoObject(no_object_weight=config.no_object_weight)


def _total(loss: Float[Array, "L B Q C"], counted: Bool[Array, "B Q"] | None) -> Float[Array, " L"]:
    """The sum over all queries that are `counted`, and all logits."""
    if counted is not None:
        loss = jnp.where(counted[None, ..., None], loss, 0.0)
    return jnp.sum(loss, axis=(1, 2, 3))


def _one_hot(labels, num_logits):
    """True at each label; nowhere for -1."""
    return labels[..., None] == jax.lax.broadcasted_iota(jnp.int32, labels.shape + (num_logits,), labels.ndim)


def _at_labels(values: Float[Array, "L B Q C"], labels: Int32[Array, "B N"]) -> Float[Array, "L B Q N"]:
    """values[l, b, q, labels[b, n]], as a product with one-hot columns: exact, and faster than a gather on TPUs."""
    columns = _one_hot(labels, values.shape[-1]).astype(values.dtype)
    return jnp.einsum("lbqc,bnc->lbqn", values, columns, precision=jax.lax.Precision.HIGHEST)

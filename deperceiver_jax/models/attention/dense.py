"""Dense attention as it is written in papers: the whole matrix at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.kernels.log_gaussian import LogGaussian, bias_map
from deperceiver_jax.models.layers.by_platform import target_platform
from deperceiver_jax.models.layers.linear import draw_kept, drop
from deperceiver_jax.models.layers.sum_of_products import sum_of_products


def dense_attention(
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None = None,
    bias: Float[Array, "B Hb Qb K"] | LogGaussian | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B H Q E"]:
    """softmax(q k^T / sqrt(D) + bias) v, over the keys where `key_valid` is True.

    `bias` broadcasts over heads and queries where its axis is 1; a LogGaussian is computed here. The softmax is in
    float32. A query without any valid key gets zeros, as in Perceiver IO, and never NaN.
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias_map(bias)
    mask = None if key_valid is None else key_valid[:, None, None, :]
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    kept = draw_kept(logits.shape, dropout_rate, dropout_key)
    if kept is not None and target_platform() == "cpu":
        return _average_of_kept(logits, mask, kept, value, dropout_rate)
    return _average(_softmax(logits), mask, kept, value, dropout_rate)


def _average(probabilities, mask, kept, value, rate):
    """Of the values, of which only keys of the mask and what is kept count."""
    if mask is not None:
        probabilities = jnp.where(mask, probabilities, 0.0)
    return jnp.einsum("bhqk,bhke->bhqe", drop(probabilities.astype(value.dtype), kept, rate), value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _average_of_kept(logits, mask, kept, value, rate):
    """`_average` of the softmax, which keeps one matrix for its gradient: the softmax, negative where it is dropped.

    JAX's own keeps what is kept and what dropout makes of the softmax as well, and a step of DETR or SMCA takes a CPU
    longer so. A TPU would move more bytes than it does without this.
    """
    return _average(jax.nn.softmax(logits, axis=-1), mask, kept, value, rate)


def _average_of_kept_forward(logits, mask, kept, value, rate):
    probabilities = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        probabilities = jnp.where(mask, probabilities, 0.0)
    return _average(probabilities, None, kept, value, rate), (jnp.where(kept, probabilities, -probabilities), value)


def _average_of_kept_backward(rate, signed_and_value, gradient):
    signed, value = signed_and_value
    kept, probabilities = signed > 0, jnp.abs(signed)  # where the softmax is 0, whether it is kept makes no difference
    of_value = jnp.einsum("bhqk,bhqe->bhke", drop(probabilities.astype(value.dtype), kept, rate), gradient)
    of_dropped = jnp.einsum("bhqe,bhke->bhqk", gradient, value)
    of_probabilities = drop(of_dropped, kept, rate).astype(signed.dtype)
    return *_softmax_backward(probabilities, of_probabilities), None, None, of_value


_average_of_kept.defvjp(_average_of_kept_forward, _average_of_kept_backward)


@jax.custom_vjp
def _softmax(logits: Float[Array, "B H Q K"]) -> Float[Array, "B H Q K"]:
    return jax.nn.softmax(logits, axis=-1)


def _softmax_forward(logits):
    probabilities = jax.nn.softmax(logits, axis=-1)
    return probabilities, probabilities


def _softmax_backward(probabilities, gradient):
    """As JAX's own, whose sum takes a CPU up to a fifth of a training step."""
    mean = sum_of_products(probabilities, gradient, axis=-1)[..., None]
    return (probabilities * (gradient - mean),)


_softmax.defvjp(_softmax_forward, _softmax_backward)

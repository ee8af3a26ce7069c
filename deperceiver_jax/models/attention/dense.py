"""Dense attention as it is written in papers: the whole matrix at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.kernels.log_gaussian import LogGaussian, bias_map
from deperceiver_jax.models.layers.linear import draw_kept, drop


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
    return _attend(dropout_rate, logits, value, key_valid, draw_kept(logits.shape, dropout_rate, dropout_key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    dropout_rate: float,
    logits: Float[Array, "B H Q K"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None,
    kept: Bool[Array, "B H Q K"] | None,
) -> Float[Array, "B H Q E"]:
    """dropout(softmax(logits)) v. `kept` is `draw_kept`'s."""
    return _attend_forward(dropout_rate, logits, value, key_valid, kept)[0]


def _attend_forward(dropout_rate, logits, value, key_valid, kept):
    if key_valid is None:
        probabilities = jax.nn.softmax(logits, axis=-1)
    else:
        mask = key_valid[:, None, None, :]
        probabilities = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0.0)
    dropped = drop(probabilities.astype(value.dtype), dropout_rate, kept)
    attended = jnp.einsum("bhqk,bhke->bhqe", dropped, value)
    return attended, (probabilities, value, kept, attended)


def _attend_backward(dropout_rate, saved, gradient):
    """What softmax subtracts, the sum over keys of probability times gradient, is also the sum over channels of
    `attended` times its gradient, and there are fewer channels (Dao et al., "FlashAttention", arXiv:2205.14135,
    appendix B). XLA's CPU took up to a fifth of a step for the first."""
    probabilities, value, kept, attended = saved
    dropped = drop(probabilities.astype(value.dtype), dropout_rate, kept)
    of_value = jnp.einsum("bhqk,bhqe->bhke", dropped, gradient)
    of_dropped = jnp.einsum("bhqe,bhke->bhqk", gradient, value)
    of_probabilities = drop(of_dropped, dropout_rate, kept).astype(probabilities.dtype)
    mean = jnp.sum(gradient.astype(probabilities.dtype) * attended.astype(probabilities.dtype), -1, keepdims=True)
    return probabilities * (of_probabilities - mean), of_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)

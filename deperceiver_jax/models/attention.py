"""Multi-head attention, the only dense attention of every detector here."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.attention_choice import attention_of
from deperceiver_jax.models.attention_record import record_dense
from deperceiver_jax.models.linear import dropout, linear, split_key, xavier_uniform_init
from deperceiver_jax.models.log_gaussian import LogGaussian, bias_map, bias_of_keys


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
    if key_valid is None:
        probabilities = jax.nn.softmax(logits, axis=-1)
    else:
        mask = key_valid[:, None, None, :]
        probabilities = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0.0)
    probabilities = dropout(probabilities.astype(value.dtype), dropout_rate, dropout_key)
    return jnp.einsum("bhqk,bhke->bhqe", probabilities, value)


class MultiHeadAttention(nnx.Module):
    """Attention of `query_in` to `key_in` and `value_in`, with a linear layer before each and after the result.

    Heads are contiguous blocks of channels. The width of queries and keys (`qk_dim`) and of the result (`out_dim`)
    are the query's own, and the values' width is `qk_dim`, unless they are given. The layers start as torch.nn.Linear
    does; with `xavier` as DETR's: biases zero, kernels Xavier-uniform, where the three input kernels are drawn as the
    parts of one matrix (so their range is sqrt(6 / (in + 3 out)), not sqrt(6 / (in + out))).
    """

    def __init__(
        self,
        query_dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        qk_dim: int | None = None,
        out_dim: int | None = None,
        dropout: float = 0.0,
        xavier: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        def layer(in_dim, dim, parts=1):
            init = dict(kernel_init=xavier_uniform_init(in_dim, parts * dim), bias_init=nnx.initializers.zeros)
            return linear(in_dim, dim, **(init if xavier else {}), dtype=dtype, rngs=rngs)

        qk_dim = qk_dim or query_dim
        if qk_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide an attention of width {qk_dim}.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.implementation = "auto"  # build_detector sets it: config.attention
        self.query = layer(query_dim, qk_dim, parts=3)
        self.key = layer(key_dim or query_dim, qk_dim, parts=3)
        self.value = layer(value_dim or key_dim or query_dim, qk_dim, parts=3)
        self.out = layer(qk_dim, out_dim or query_dim)

    def __call__(
        self,
        query_in: Float[Array, "B Q C"],
        key_in: Float[Array, "B K C2"],
        value_in: Float[Array, "B K C3"],
        **attention,
    ) -> Float[Array, "B Q out_dim"]:
        """`attention`: the masks, biases and segments of `attend`."""
        return self.out(self.attend(self.query(query_in), self.key(key_in), self.value(value_in), **attention))

    def attend(
        self,
        query: Float[Array, "B Q D"],
        key: Float[Array, "B K D"],
        value: Float[Array, "B K D"],
        *,
        key_valid: Bool[Array, "B K"] | None = None,
        bias: Float[Array, "B Hb Qb K"] | LogGaussian | None = None,
        segments: Sequence[int] | None = None,
        segment_weight: Float[Array, "B Q S"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B Q D"]:
        """What lies between the linear layers: projected queries, keys and values in, the heads side by side out.

        `key_valid` is False on padding; `bias` is added to the scaled logits. Dropout is on the probabilities.
        `segments`: lengths of consecutive runs of keys. Each has a softmax of its own, and their results are added,
        times `segment_weight` if that is given.
        """
        attend = functools.partial(attention_of(self.implementation, dense_attention), dropout_rate=self.dropout)
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        record_dense(self, query, key, key_valid, bias, segments, segment_weight)
        if segments is None:
            attended = attend(query, key, value, key_valid, bias, dropout_key=dropout_key)
        else:
            ends = list(itertools.accumulate(segments))
            attended = jnp.zeros_like(query)
            for i, part_key in enumerate(split_key(dropout_key, len(ends))):
                part = slice(ends[i] - segments[i], ends[i])
                valid = None if key_valid is None else key_valid[:, part]
                part_bias = bias_of_keys(bias, part)
                result = attend(query, key[:, :, part], value[:, :, part], valid, part_bias, dropout_key=part_key)
                if segment_weight is not None:
                    result = result * segment_weight[:, None, :, i, None].astype(result.dtype)
                attended = attended + result
        batch, _, length, _ = attended.shape
        return attended.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def _split_heads(self, x):
        batch, length, width = x.shape
        return x.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(0, 2, 1, 3)

"""Multi-head attention, the only dense attention of every detector here."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention.choice import attention
from deperceiver_jax.models.kernels.log_gaussian import Bias, bias_of_keys
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.linear import linear, split_key, xavier_start
from deperceiver_jax.models.layers.recorder import record_dense


class MultiHeadAttention(nnx.Module):
    """Attention of `query_in` to `key_in` and `value_in`, with a linear layer before each and after the result.

    Heads are contiguous blocks of channels, as wide in all as the query. The layers start as torch.nn.Linear does;
    with `xavier` as DETR's: biases zero, kernels Xavier-uniform, where the three input kernels are drawn as the
    parts of one matrix (so their range is sqrt(6 / (in + 3 out)), not sqrt(6 / (in + out))).
    """

    def __init__(
        self,
        query_dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        dropout: float = 0.0,
        xavier: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        def layer(in_dim, dim, parts=1):
            start = xavier_start(in_dim, parts * dim) if xavier else {}
            return linear(in_dim, dim, **start, dtype=compute.dtype, rngs=rngs)

        if num_heads < 1 or query_dim % num_heads:
            raise UserError(f"num_heads is {num_heads}; it must divide {query_dim}, the width of the attention.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.implementation = "portable" if compute.portable else compute.attention
        self.query = layer(query_dim, query_dim, parts=3)
        self.key = layer(key_dim or query_dim, query_dim, parts=3)
        self.value = layer(key_dim or query_dim, query_dim, parts=3)
        self.out = layer(query_dim, query_dim)

    def __call__(
        self,
        query_in: Float[Array, "B Q C"],
        key_in: Float[Array, "B K C2"],
        value_in: Float[Array, "B K C2"],
        **masks,
    ) -> Float[Array, "B Q C"]:
        """`masks`: the masks, biases and segments of `attend`."""
        return self.out(self.attend(self.query(query_in), self.key(key_in), self.value(value_in), **masks))

    def attend(
        self,
        query: Float[Array, "B Q D"],
        key: Float[Array, "B K D"],
        value: Float[Array, "B K D"],
        *,
        key_valid: Bool[Array, "B K"] | None = None,
        bias: Bias | list[Bias] | None = None,
        segments: Sequence[int] | None = None,
        segment_weight: Float[Array, "B Q S"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B Q D"]:
        """What lies between the linear layers: projected queries, keys and values in, the heads side by side out.

        `key_valid` is False on padding; `bias`, or a list with one for each segment, is added to the scaled logits.
        Dropout is on the probabilities.
        `segments`: lengths of consecutive runs of keys. Each has a softmax of its own, and their results are added,
        times `segment_weight` if that is given.
        """

        def attend(*arrays, dropout_key):
            return attention(self.implementation, *arrays, dropout_rate=self.dropout, dropout_key=dropout_key)

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
                part_bias = bias[i] if isinstance(bias, list) else bias_of_keys(bias, part)
                result = attend(query, key[:, :, part], value[:, :, part], valid, part_bias, dropout_key=part_key)
                if segment_weight is not None:
                    result = result * segment_weight[:, None, :, i, None].astype(result.dtype)
                attended = attended + result
        batch, _, length, _ = attended.shape
        return attended.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def _split_heads(self, x):
        batch, length, width = x.shape
        return x.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(0, 2, 1, 3)

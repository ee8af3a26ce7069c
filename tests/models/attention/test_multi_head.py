"""The one dense attention: against a plain NumPy softmax, with masks and biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention.dense import dense_attention
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.models.layers.linear import dropout
from tests.drawn_arrays import FLOAT32, answer_of
from tests.meshes import mesh_on


def softmax_attention(query, key, value, valid, bias):
    """One query at a time, in float64."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, h, q in np.ndindex(query.shape[:3]):
        kept = np.flatnonzero(valid[b])
        logits = key[b, h, kept].astype(np.float64) @ query[b, h, q] / np.sqrt(query.shape[-1]) + bias[b, h, q, kept]
        weights = np.exp(logits - logits.max(initial=0))
        out[b, h, q] = weights @ value[b, h, kept] / weights.sum() if len(kept) else 0
    return out


@jax.jit
def compiled(*arguments):
    return dense_attention(*arguments)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(3, 2, 4, 8)), rng.normal(size=(3, 2, 5, 8))
    value, bias = rng.normal(size=(3, 2, 5, 6)), rng.normal(size=(3, 2, 4, 5))
    valid = np.array([[True] * 5, [True, False, True, False, False], [False] * 5])
    return [a.astype(np.float32) for a in (query, key, value)], valid, bias.astype(np.float32)


def test_equals_a_plain_softmax_and_rows_without_keys_are_zero():
    (query, key, value), valid, bias = arrays()
    out = np.asarray(compiled(query, key, value, valid, bias))
    np.testing.assert_allclose(out, softmax_attention(query, key, value, valid, bias), atol=1e-5)
    assert not np.any(out[2])


def test_gradient_is_finite_without_any_valid_key():
    (query, key, value), valid, bias = arrays()
    gradient = np.asarray(jax.jit(jax.grad(lambda q: dense_attention(q, key, value, valid, bias).sum()))(query))
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[2])


@pytest.mark.parametrize(("rate", "platform"), [(0.0, "cpu"), (0.3, "cpu"), (0.3, "tpu")])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_formula(rate, platform, masked):
    """As JAX differentiates it; of ours that of the softmax is written out, and a CPU repeats dropout for it."""
    (query, key, value), valid, bias = arrays()
    cotangent = np.random.default_rng(7).normal(size=(3, 2, 4, 6)).astype(np.float32)
    drops = dict(dropout_rate=rate, dropout_key=jax.random.key(3))

    def formula(query, key, value, bias):
        weights = jnp.exp(jnp.einsum("bhqd,bhkd->bhqk", query, key) / jnp.sqrt(8.0) + bias)
        if masked:
            weights = jnp.where(valid[:, None, None], weights, 0.0)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        return dropout(weights, rate, drops["dropout_key"]) @ value

    def ours(query, key, value, bias):
        return dense_attention(query, key, value, valid if masked else None, bias, **drops)

    def value_and_gradients(function):
        result, backward = jax.vjp(function, query, key, value, bias)
        return result, backward(cotangent)

    @traced_for(mesh_on(platform))
    def both():
        return value_and_gradients(ours), value_and_gradients(formula)

    found, expected = jax.jit(both)()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for gradient, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)
        assert np.abs(other).max() > 0.1


def test_padding_never_reaches_the_result():
    (query, key, value), valid, bias = arrays()
    wild = np.where(valid[:, None, :, None], value, 1e9).astype(np.float32)
    np.testing.assert_array_equal(compiled(query, key, value, valid, bias), compiled(query, key, wild, valid, bias))


def test_heads_are_contiguous_channel_blocks():
    attention = MultiHeadAttention(4, 2, compute=FLOAT32, rngs=nnx.Rngs(0))
    for layer in (attention.query, attention.key, attention.value, attention.out):
        layer.kernel.set_value(np.eye(4, dtype=np.float32))
        layer.bias.set_value(np.zeros(4, np.float32))
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    out = answer_of(attention, x, x, x)
    for head in (slice(0, 2), slice(2, 4)):
        one = np.asarray(compiled(*[x[:, None, :, head]] * 3))[:, 0]
        np.testing.assert_allclose(out[..., head], one, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_segments_have_a_softmax_each(weighted):
    """The results for two runs of keys, added; with weights of each query if there are any."""
    attention = MultiHeadAttention(8, 2, compute=FLOAT32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, n, 8)).astype(np.float32) for n in (3, 7))
    bias = rng.normal(size=(2, 2, 3, 7)).astype(np.float32)
    valid = np.ones((2, 7), bool)
    valid[1, 2:4] = False
    weight = rng.normal(size=(2, 3, 2)).astype(np.float32) if weighted else None

    @jax.jit
    def answers():
        """In segments, as the sum of what they give, and without any."""
        projected = attention.query(x), attention.key(y), attention.value(y)
        expected = 0
        for i, part in enumerate((slice(0, 4), slice(4, 7))):
            keys = [a[:, part] for a in projected[1:]]
            result = attention.attend(projected[0], *keys, key_valid=valid[:, part], bias=bias[..., part])
            expected += result if weight is None else result * weight[..., i, None]
        segments = dict(segments=(4, 3), segment_weight=weight)
        whole = attention(x, y, y, key_valid=valid, bias=bias)
        return attention(x, y, y, key_valid=valid, bias=bias, **segments), attention.out(expected), whole

    answer, expected, whole = jax.device_get(answers())
    np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert np.abs(answer - whole).max() > 1e-2


def test_dropout_keeps_the_mean_and_needs_a_key():
    attention = MultiHeadAttention(8, 2, dropout=0.5, compute=FLOAT32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 6, 8), np.float32)
    plain = answer_of(attention, x, x, x)
    np.testing.assert_array_equal(plain, answer_of(attention, x, x, x))
    keys = jax.random.split(jax.random.key(0), 300)
    dropped = np.asarray(jax.jit(jax.vmap(lambda key: attention(x, x, x, dropout_key=key)))(keys))
    assert np.abs(dropped[0] - plain).max() > 1e-3
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=0.15)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads is 3; it must divide 8"):
        MultiHeadAttention(8, 3, compute=FLOAT32, rngs=nnx.Rngs(0))

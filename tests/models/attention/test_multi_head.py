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
from tests.drawn_arrays import FLOAT32
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


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(3, 2, 4, 8)), rng.normal(size=(3, 2, 5, 8))
    value, bias = rng.normal(size=(3, 2, 5, 6)), rng.normal(size=(3, 2, 4, 5))
    valid = np.array([[True] * 5, [True, False, True, False, False], [False] * 5])
    return [a.astype(np.float32) for a in (query, key, value)], valid, bias.astype(np.float32)


def test_equals_a_plain_softmax_and_rows_without_keys_are_zero():
    (query, key, value), valid, bias = arrays()
    out = dense_attention(*map(jnp.asarray, (query, key, value, valid, bias)))
    np.testing.assert_allclose(out, softmax_attention(query, key, value, valid, bias), atol=1e-5)
    assert not np.any(out[2])


def test_gradient_is_finite_without_any_valid_key():
    (query, key, value), valid, bias = arrays()
    gradient = jax.grad(lambda q: dense_attention(q, key, value, jnp.asarray(valid), bias).sum())(jnp.asarray(query))
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[2])


@pytest.mark.parametrize(("rate", "platform"), [(0.0, "cpu"), (0.3, "cpu"), (0.3, "tpu")])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_formula(rate, platform, masked):
    """As JAX differentiates it; of ours that of the softmax is written out, and a CPU repeats dropout for it."""
    (query, key, value), valid, bias = (jax.tree.map(jnp.asarray, x) for x in arrays())
    cotangent = jnp.asarray(np.random.default_rng(7).normal(size=(3, 2, 4, 6)), jnp.float32)
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
    np.testing.assert_array_equal(
        dense_attention(*map(jnp.asarray, (query, key, value, valid, bias))),
        dense_attention(*map(jnp.asarray, (query, key, wild, valid, bias))),
    )


def test_heads_are_contiguous_channel_blocks():
    attention = MultiHeadAttention(4, 2, compute=FLOAT32, rngs=nnx.Rngs(0))
    for layer in (attention.query, attention.key, attention.value, attention.out):
        layer.kernel[...] = jnp.eye(4)
        layer.bias[...] = jnp.zeros(4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    out = attention(x, x, x)
    for head in (slice(0, 2), slice(2, 4)):
        one = dense_attention(x[:, None, :, head], x[:, None, :, head], x[:, None, :, head])[:, 0]
        np.testing.assert_allclose(out[..., head], one, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_segments_have_a_softmax_each(weighted):
    """The results for two runs of keys, added; with weights of each query if there are any."""
    attention = MultiHeadAttention(8, 2, compute=FLOAT32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(2, n, 8)), jnp.float32) for n in (3, 7))
    bias = jnp.asarray(rng.normal(size=(2, 2, 3, 7)), jnp.float32)
    valid = jnp.ones((2, 7), bool).at[1, 2:4].set(False)
    weight = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32) if weighted else None
    projected = attention.query(x), attention.key(y), attention.value(y)
    expected = 0
    for i, part in enumerate((slice(0, 4), slice(4, 7))):
        keys = [a[:, part] for a in projected[1:]]
        result = attention.attend(projected[0], *keys, key_valid=valid[:, part], bias=bias[..., part])
        expected += result if weight is None else result * weight[..., i, None]
    segments = dict(segments=(4, 3), segment_weight=weight)
    answer = attention(x, y, y, key_valid=valid, bias=bias, **segments)
    np.testing.assert_allclose(answer, attention.out(expected), atol=1e-5)
    assert np.abs(answer - attention(x, y, y, key_valid=valid, bias=bias)).max() > 1e-2


def test_dropout_keeps_the_mean_and_needs_a_key():
    attention = MultiHeadAttention(8, 2, dropout=0.5, compute=FLOAT32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    plain = attention(x, x, x)
    np.testing.assert_array_equal(plain, attention(x, x, x))
    dropped = jnp.stack([attention(x, x, x, dropout_key=jax.random.key(i)) for i in range(300)])
    assert float(jnp.abs(dropped[0] - plain).max()) > 1e-3
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=0.15)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads is 3; it must divide 8"):
        MultiHeadAttention(8, 3, compute=FLOAT32, rngs=nnx.Rngs(0))

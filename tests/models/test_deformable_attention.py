"""Multi-scale deformable attention: by hand, against the published formulation, and by finite differences."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.multi_scale_deformable_attention import MultiScaleDeformableAttention, sample_levels

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "deformable_attention.npz")
SIZES = ((5, 7), (3, 4), (1, 2))


def example(dtype=np.float32):
    """value, location (a third of the points outside), weight, cotangent: as the published side drew them."""
    rng = np.random.default_rng(5)
    tokens = sum(height * width for height, width in SIZES)
    value = rng.standard_normal((2, tokens, 3, 4))
    location = rng.uniform(-0.4, 1.4, (2, 6, 3, 3, 2, 2))
    weight = rng.uniform(0, 1, (2, 6, 3, 3, 2))
    cotangent = rng.standard_normal((2, 6, 12))
    return tuple(jnp.asarray(x, dtype) for x in (value, location, weight, cotangent))


@jax.jit
def output_and_gradients(value, location, weight, cotangent):
    """Flattened output, and gradients of its product with the cotangent."""

    def product(value, location, weight):
        output = sample_levels(value, SIZES, location, weight).reshape(2, 6, 12)
        return jnp.sum(output * cotangent), output

    gradients, output = jax.grad(product, argnums=(0, 1, 2), has_aux=True)(value, location, weight)
    return output, *gradients


def test_values_and_gradients_are_those_of_the_published_formulation():
    found = output_and_gradients(*example())
    for name, array in zip(("output", "value", "location", "weight"), found, strict=True):
        np.testing.assert_allclose(array, GOLDEN[name], rtol=0, atol=2e-5, err_msg=name)


def test_gradients_are_finite_differences():
    """Along random directions, of steps too small to carry a point over the edge of a cell."""
    value, location, weight, cotangent = example()
    _, *gradients = output_and_gradients(value, location, weight, cotangent)
    rng = np.random.default_rng(1)

    def product(*arguments):
        output = output_and_gradients(*arguments, cotangent)[0]
        return float(np.sum(np.asarray(output, np.float64) * np.asarray(cotangent, np.float64)))

    for position, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape).astype(np.float32)
        if position == 1:  # points within 0.02 cells of an edge stay where they are
            sizes = np.array([(width, height) for height, width in SIZES], np.float32)[None, None, None, :, None]
            share = (np.asarray(location) * sizes - 0.5) % 1
            direction *= (share > 0.02) & (share < 0.98)
        step = 1e-3
        ahead, behind = (
            [a + sign * step * direction if i == position else a for i, a in enumerate((value, location, weight))]
            for sign in (1, -1)
        )
        difference = (product(*ahead) - product(*behind)) / (2 * step)
        assert difference == pytest.approx(float(np.sum(np.asarray(gradient) * direction)), rel=2e-3)


@pytest.mark.parametrize(
    "point, expected",
    [
        ((0.5, 0.5), 2.5),
        ((0, 0), 0.25),
        ((0.25, 0.25), 1),
        ((0.75, 0.25), 2),
        ((1, 1), 1),
        ((1.25, 1), 0),
        ((-9, 3), 0),
    ],
)
def test_bilinear_by_hand(point, expected):
    """The map [[1, 2], [3, 4]]: half a cell outside, half of a value is left; a whole one, nothing."""
    value = jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1)
    location = jnp.asarray(point, jnp.float32).reshape(1, 1, 1, 1, 1, 2)
    found = sample_levels(value, ((2, 2),), location, jnp.ones((1, 1, 1, 1, 1)))
    assert found.shape == (1, 1, 1, 1)
    assert float(found[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-6)


def test_far_points_give_zero_and_no_gradient():
    value, location, weight, cotangent = example()
    output, of_value, of_location, of_weight = output_and_gradients(value, location * 1e30, weight, cotangent)
    for array in (output, of_value, of_location, of_weight):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_bfloat16_rounds_values_and_not_places():
    value, location, weight, _ = example()
    exact = sample_levels(value.astype(jnp.bfloat16).astype(jnp.float32), SIZES, location, weight)
    half = sample_levels(value.astype(jnp.bfloat16), SIZES, location, weight)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


def new_attention(dtype=jnp.float32, **changes):
    sizes = dict(num_heads=4, num_levels=2, num_points=3) | changes
    return MultiScaleDeformableAttention(16, **sizes, dtype=dtype, rngs=nnx.Rngs(0))


def test_start_is_a_star():
    """Eight heads look along eight directions, points one step further each; all weigh alike."""
    attention = MultiScaleDeformableAttention(
        16, num_heads=8, num_levels=2, num_points=4, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    star = np.asarray(attention.sampling_offsets.bias[...]).reshape(8, 2, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for level in range(2):
        for point in range(4):
            np.testing.assert_allclose(star[:, level, point], (point + 1) * np.array(directions), atol=1e-5)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        assert not np.asarray(layer.kernel[...]).any()
    for layer in (attention.value, attention.out):
        assert not np.asarray(layer.bias[...]).any()
        bound = math.sqrt(6 / 32)
        assert 0.9 * bound < np.abs(layer.kernel[...]).max() <= bound


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padded_tokens_are_zeros(dtype):
    """Also their bias: a query whose every point lies on padding gets the output layer's bias alone."""
    attention = new_attention(dtype)
    attention.value.bias[...] = jnp.ones(16)
    attention.out.bias[...] = jnp.arange(16.0)
    sizes = ((4, 6), (2, 3))
    rng = np.random.default_rng(0)
    query, tokens = (jnp.asarray(rng.standard_normal((1, n, 16)), dtype) for n in (2, 30))
    reference = jnp.asarray([[0.1, 0.5], [0.9, 0.5]], jnp.float32)[None, :, None].repeat(2, axis=2)
    scale = jnp.full((1, 2, 2, 2), 0.01)  # all points stay near the reference
    valid = np.concatenate([np.broadcast_to(np.arange(w) < w / 3, (h, w)).reshape(-1) for h, w in sizes])[None]
    call = nnx.jit(lambda attention, *arguments: attention(*arguments, level_sizes=sizes))
    answer = call(attention, query, reference, scale, tokens, valid)
    assert answer.dtype == dtype
    np.testing.assert_array_equal(np.asarray(answer[0, 1], np.float32), np.arange(16.0))
    assert np.abs(np.asarray(answer[0, 0], np.float32) - np.arange(16.0)).max() > 0.1
    changed = call(attention, query, reference, scale, jnp.where(valid[..., None], tokens, 100), valid)
    np.testing.assert_array_equal(changed, answer)


@pytest.mark.parametrize("changes, sentence", [({"num_heads": 3}, "3 heads do not divide"), ({"num_points": 0}, "0 p")])
def test_bad_sizes(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        new_attention(**changes)

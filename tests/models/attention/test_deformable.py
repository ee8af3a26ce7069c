"""Multi-scale deformable attention: by hand, against the published formulation, and by finite differences."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention.deformable import MultiScaleDeformableAttention
from deperceiver_jax.models.kernels import pallas, sampling_kernel
from deperceiver_jax.models.layers import level_sampling
from deperceiver_jax.models.layers.level_sampling import in_cells, sample_by_kernel, sample_levels
from deperceiver_jax.sharding import batch_sharding, make_mesh
from tests.drawn_arrays import FLOAT32

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "deformable_attention.npz")
SIZES = ((5, 7), (3, 4), (1, 2))
simulated_tpu = pytest.mark.usefixtures("tpu_simulation")  # which the kernel needs here


def both_ways(test):
    return simulated_tpu(pytest.mark.parametrize("sampling", ["gather", "kernel"])(test))


@pytest.fixture(autouse=True)
def blocks_of_four_queries(monkeypatch):
    """At most; so that six queries are two blocks of three, and five are filled up to six."""
    monkeypatch.setattr(level_sampling, "GATHER_FLOATS", 4 * 3 * 3 * 2 * 16)


@pytest.fixture
def tpu_simulation():
    with pltpu.force_tpu_interpret_mode():
        yield


def example():
    """value, location (a third of the points outside), weight, cotangent: as the published side drew them."""
    rng = np.random.default_rng(5)
    tokens = sum(height * width for height, width in SIZES)
    value = rng.standard_normal((2, tokens, 3, 4))
    location = rng.uniform(-0.4, 1.4, (2, 6, 3, 3, 2, 2))
    weight = rng.uniform(0, 1, (2, 6, 3, 3, 2))
    cotangent = rng.standard_normal((2, 6, 12))
    return tuple(x.astype(np.float32) for x in (value, location, weight, cotangent))


def sample(value, sizes, location, weight, sampling):
    if sampling == "kernel":
        return sample_by_kernel(sizes, value, in_cells(location, sizes), weight)
    return sample_levels(value, sizes, location, weight, sampling=sampling)


compiled_sample = jax.jit(sample, static_argnames=("sizes", "sampling"))


def output_and_gradients(value, location, weight, cotangent, sampling, sizes=SIZES):
    """In NumPy: the output, flattened as the cotangent is, and gradients of its product with that."""
    return jax.device_get(_output_and_gradients(value, location, weight, cotangent, sampling, sizes))


@functools.partial(jax.jit, static_argnames=("sampling", "sizes"))
def _output_and_gradients(value, location, weight, cotangent, sampling, sizes):
    def product(value, location, weight):
        output = sample(value, sizes, location, weight, sampling).reshape(cotangent.shape)
        return jnp.sum(output.astype(jnp.float32) * cotangent), output

    gradients, output = jax.grad(product, argnums=(0, 1, 2), has_aux=True)(value, location, weight)
    return output, *gradients


@both_ways
def test_values_and_gradients_are_those_of_the_published_formulation(sampling):
    found = output_and_gradients(*example(), sampling)
    for name, array in zip(("output", "value", "location", "weight"), found, strict=True):
        np.testing.assert_allclose(array, GOLDEN[name], rtol=0, atol=2e-5, err_msg=name)


def test_gradients_are_finite_differences():
    """Along random directions, of steps too small to carry a point over the edge of a cell."""
    value, location, weight, cotangent = example()
    _, *gradients = output_and_gradients(value, location, weight, cotangent, "gather")
    rng = np.random.default_rng(1)

    def product(*arguments):
        output = output_and_gradients(*arguments, cotangent, "gather")[0]
        return float(np.sum(np.float64(output) * np.float64(cotangent)))

    for position, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape).astype(np.float32)
        if position == 1:  # points within 0.1 cells of an edge stay where they are
            sizes = np.array([(width, height) for height, width in SIZES], np.float32)[None, None, None, :, None]
            share = (location * sizes - 0.5) % 1
            direction *= (share > 0.1) & (share < 0.9)
        step = 4e-3
        ahead, behind = (
            [a + sign * step * direction if i == position else a for i, a in enumerate((value, location, weight))]
            for sign in (1, -1)
        )
        difference = (product(*ahead) - product(*behind)) / (2 * step)
        assert difference == pytest.approx(float(np.sum(gradient * direction)), rel=2e-3)


def cell_centre_location():
    """Points exactly on the centres of cells, on the edges of maps and one cell outside, where bilinear has a kink."""
    sizes = np.array([(width, height) for height, width in SIZES], np.float32)[None, None, None, :, None]
    cells = np.random.default_rng(2).integers(-2, 9, (2, 6, 3, 3, 2, 2)).astype(np.float32) / 2
    return (cells + 0.5) / sizes


@simulated_tpu
@pytest.mark.parametrize("place", ["anywhere", "centre"])
def test_both_ways_are_equal(place):
    """Also where a point sits on a kink and a gradient is a choice; a star of whole cells starts every training."""
    value, location, weight, cotangent = example()
    location = location if place == "anywhere" else cell_centre_location()
    gathered = output_and_gradients(value, location, weight, cotangent, "gather")
    by_kernel = output_and_gradients(value, location, weight, cotangent, "kernel")
    for first, second in zip(gathered, by_kernel, strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-5)
        assert np.abs(first).max() > 0.5


def test_five_queries_are_the_first_of_six():
    """What fills the last block changes nothing."""
    value, location, weight, cotangent = example()
    cotangent[:, 5] = 0
    six = output_and_gradients(value, location, weight, cotangent, "gather")
    five = output_and_gradients(value, location[:, :5], weight[:, :5], cotangent[:, :5], "gather")
    for name, first, second in zip(("output", "value", "location", "weight"), six, five, strict=True):
        first = first if name == "value" else first[:, :5]
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6, err_msg=name)


def test_auto_gathers_on_cpus():
    arguments = example()
    for first, second in zip(*(output_and_gradients(*arguments, way) for way in ("auto", "gather")), strict=True):
        np.testing.assert_array_equal(first, second)


def test_auto_takes_the_kernel_on_tpus():
    """A lowering for a platform needs no such device."""

    def lowered(sampling, platform):
        function = functools.partial(sample_levels, level_sizes=SIZES, sampling=sampling)
        value, location, weight, _ = example()
        exported = jax.export.export(jax.jit(function), platforms=[platform])(
            value=value, location=location, weight=weight
        )
        return exported.mlir_module()

    for sampling, platform, gathers in (("auto", "tpu", 0), ("auto", "cuda", 1), ("gather", "tpu", 1)):
        module = lowered(sampling, platform)
        assert ("stablehlo.gather" in module) == gathers, (sampling, platform)
        assert ("tpu_custom_call" in module) != gathers, (sampling, platform)


@both_ways
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
def test_bilinear_by_hand(point, expected, sampling):
    """The map [[1, 2], [3, 4]]: half a cell outside, half of a value is left; a whole one, nothing."""
    value = np.arange(1, 5, dtype=np.float32).reshape(1, 4, 1, 1)
    location = np.float32(point).reshape(1, 1, 1, 1, 1, 2)
    found = compiled_sample(value, ((2, 2),), location, np.ones((1, 1, 1, 1, 1), np.float32), sampling)
    assert found.shape == (1, 1, 1, 1)
    assert np.asarray(found).item() == pytest.approx(expected, abs=1e-6)


@both_ways
def test_far_points_give_zero_and_no_gradient(sampling):
    value, location, weight, cotangent = example()
    for array in output_and_gradients(value, location * np.float32(1e30), weight, cotangent, sampling):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_images_of_several_devices_stay_where_they_are():
    mesh = make_mesh()

    @jax.jit
    def gradients(value, location, weight):
        def total(*arrays):
            return jnp.sum(sample_levels(arrays[0], SIZES, *arrays[1:], sampling="gather") ** 2)

        return jax.grad(total, argnums=(0, 1, 2))(value, location, weight)

    shapes = [(16, *array.shape[1:]) for array in example()[:3]]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh)) for shape in shapes]
    text = gradients.lower(*shapes).compile().as_text()
    assert "f32[2,49,3,4]" in text  # two images of sixteen
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_a_place_that_is_no_number_is_not_hidden():
    value, location, weight, _ = example()
    location[0, 0] = np.nan
    found = np.asarray(compiled_sample(value, SIZES, location, weight, "gather"))
    assert np.all(np.isnan(found[0, 0])) and not np.any(np.isnan(found[0, 1:]))


def test_bfloat16_gather_rounds_values_and_not_places():
    value, location, weight, _ = example()
    value = value.astype(jnp.bfloat16)
    exact, half = (
        np.asarray(compiled_sample(x, SIZES, location, weight, "gather")) for x in (value.astype(np.float32), value)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


@simulated_tpu
@pytest.mark.parametrize("held", [pallas.HELD, 0])
def test_kernel_of_several_strips_and_blocks_of_queries(held, monkeypatch):
    """A map of 20 x 19 is three strips of 32 columns. The second block of queries touches the first strip alone, and a
    third of its points sit exactly a row above the second, where they have no weight, but a slope."""
    monkeypatch.setattr(sampling_kernel, "QUERIES", 128)
    monkeypatch.setattr(pallas, "HELD", held)
    rng = np.random.default_rng(8)
    value, weight = (rng.normal(size=n).astype(np.float32) for n in ((1, 380, 2, 4), (1, 150, 2, 1, 3)))
    location = rng.uniform(-0.1, 1.1, (1, 150, 2, 1, 3, 2))
    location[:, 128:, ..., 1] = rng.uniform(0.1, 0.3, (1, 22, 2, 1, 3))
    location[:, 128:, ..., 0, 1] = 7.5 / 20
    cotangent = rng.normal(size=(1, 150, 2, 4)).astype(np.float32)

    @jax.jit
    def both_ways(*arguments):
        def compute(sampling):
            output, backward = jax.vjp(lambda v, x, w: sample(v, ((20, 19),), x, w, sampling), *arguments)
            return output, *backward(cotangent)

        return compute("gather"), compute("kernel")

    for first, second in zip(*both_ways(value, np.float32(location), weight), strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-4)


@simulated_tpu
def test_bfloat16_kernel_is_as_good_as_bfloat16():
    """Weights of cells are rounded, places are not: outputs and gradients stay within 1 % of their largest.

    On the largest of the levels, each of which is a kernel.
    """
    value, location, weight, cotangent = example()
    largest = value[:, :35].astype(jnp.bfloat16), location[:, :, :, :1], weight[:, :, :, :1], cotangent
    gathered, by_kernel = (output_and_gradients(*largest, way, SIZES[:1]) for way in ("gather", "kernel"))
    for first, second in zip(gathered, by_kernel, strict=True):
        assert first.dtype == second.dtype
        first, second = (np.asarray(x, np.float32) for x in (first, second))
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-2 * np.abs(first).max())


def new_attention(dtype=jnp.float32, **changes):
    sizes = dict(num_heads=4, num_levels=2, num_points=3, sampling="gather") | changes
    return MultiScaleDeformableAttention(
        16, **sizes, compute=dataclasses.replace(FLOAT32, dtype=dtype), rngs=nnx.Rngs(0)
    )


def test_start_is_a_star():
    """Eight heads look along eight directions, points one step further each; all weigh alike."""
    attention = MultiScaleDeformableAttention(
        16, num_heads=8, num_levels=2, num_points=4, sampling="auto", compute=FLOAT32, rngs=nnx.Rngs(0)
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
    attention.value.bias.set_value(np.ones(16, np.float32))
    attention.out.bias.set_value(np.arange(16, dtype=np.float32))
    sizes = ((4, 6), (2, 3))
    rng = np.random.default_rng(0)
    query, tokens = (rng.standard_normal((1, n, 16)).astype(dtype) for n in (2, 30))
    reference = np.float32([[0.1, 0.5], [0.9, 0.5]])[None, :, None].repeat(2, axis=2)
    scale = np.full((1, 2, 2, 2), 0.01, np.float32)  # all points stay near the reference
    valid = np.concatenate([np.broadcast_to(np.arange(w) < w / 3, (h, w)).reshape(-1) for h, w in sizes])[None]
    call = jax.jit(lambda *arguments: attention(*arguments, level_sizes=sizes))
    answer = np.asarray(call(query, reference, scale, tokens, valid))
    assert answer.dtype == dtype
    np.testing.assert_array_equal(np.float32(answer[0, 1]), np.arange(16.0))
    assert np.abs(np.float32(answer[0, 0]) - np.arange(16.0)).max() > 0.1
    changed = call(query, reference, scale, np.where(valid[..., None], tokens, dtype(100)), valid)
    np.testing.assert_array_equal(changed, answer)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_heads": 3}, "num_heads is 3; it must divide"),
        ({"num_points": 0}, "0 points looks nowhere"),
        ({"sampling": "scatter"}, "sampling is 'scatter'; it can be auto or gather"),
    ],
)
def test_bad_sizes(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        new_attention(**changes)

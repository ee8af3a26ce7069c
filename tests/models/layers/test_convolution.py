"""A convolution as each platform computes it: the same values and gradients, whatever size, stride and dilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import PaddedConvolution, convolution
from deperceiver_jax.sharding import batch_sharding, make_mesh, replicated
from tests.drawn_arrays import answer_of


def plain(x, kernel, stride, dilation):
    edge = kernel.shape[0] // 2 * dilation
    how = dict(rhs_dilation=(dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if x.shape[3] > kernel.shape[2]:  # groups: each on its own
        groups = x.shape[3] // kernel.shape[2]
        parts = zip(jnp.split(x, groups, axis=3), jnp.split(kernel, groups, axis=3), strict=True)
        return jnp.concatenate([plain(*part, stride, dilation) for part in parts], axis=3)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((edge, edge), (edge, edge)), **how)


@pytest.mark.parametrize("large", [2, 10**9])
@pytest.mark.parametrize(
    "frame, channels, size, stride, dilation, groups",
    [
        ((7, 9), (3, 5), 1, 1, 1, 1),
        ((7, 10), (3, 5), 1, 2, 1, 1),
        ((8, 9), (6, 4), 1, 2, 1, 1),  # narrower behind than before
        ((7, 10), (3, 5), 3, 2, 1, 1),
        ((8, 9), (3, 5), 3, 2, 1, 1),
        ((8, 9), (3, 5), 3, 1, 2, 1),
        ((9, 8), (3, 4), 7, 2, 1, 1),
        ((8, 9), (2, 6), 3, 1, 2, 3),
        ((8, 9), (2, 6), 3, 2, 1, 3),
        ((8, 9), (1, 4), 3, 1, 2, 4),  # depthwise
        ((8, 9), (1, 4), 5, 2, 1, 4),
        ((7, 10), (1, 4), 3, 2, 1, 4),
    ],
)
def test_values_and_gradients_are_those_of_a_convolution(
    monkeypatch, frame, channels, size, stride, dilation, groups, large
):
    """Also where a map counts as large."""
    for name in ("LARGE", "HEAVY"):
        monkeypatch.setattr(f"deperceiver_jax.models.layers.convolution.{name}", large)
    monkeypatch.setattr("deperceiver_jax.models.layers.convolution.FEW", 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *frame, groups * channels[0])).astype(np.float32)
    kernel = rng.standard_normal((size, size, *channels)).astype(np.float32)

    def value_and_gradients(function):
        y, backward = jax.vjp(lambda x, kernel: function(x, kernel, stride, dilation), x, kernel)
        return y, *backward(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    both = jax.jit(lambda: (value_and_gradients(convolution), value_and_gradients(plain)))
    for ours, expected in zip(*both(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2)])
def test_images_of_several_devices_stay_where_they_are(size, stride):
    """Sums over images are sums over devices: no device gets the others' maps."""
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((16, 96, 128, 64), jnp.float32, sharding=batch_sharding(mesh))
    kernel = jax.ShapeDtypeStruct((size, size, 64, 24), jnp.float32, sharding=replicated(mesh))
    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.sum(convolution(x, kernel, stride, 1) ** 2)))
    text = gradient.lower(kernel, x).compile().as_text()
    assert "while" in text and "all-reduce" in text and "all-gather" not in text


@pytest.mark.parametrize("width, channels, loops", [(128, 16, True), (96, 16, False), (200, 15, False)])
def test_large_maps_are_taken_in_loops(width, channels, loops):
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, width, channels), (3, 3, channels, 8)))
    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.sum(convolution(x, kernel, 1, 1) ** 2)))
    assert ("while" in gradient.trace(kernel, x).lower(lowering_platforms=("cpu",)).as_text()) == loops


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_padded_convolution_is_that_of_flax(stride, portable):
    compute = Compute(jnp.bfloat16, "auto", False, portable=portable)
    ours = PaddedConvolution(3, 5, 3, stride=stride, bias_init=nnx.initializers.ones, compute=compute, rngs=nnx.Rngs(0))
    how = dict(strides=stride, padding=1, dtype=jnp.bfloat16, bias_init=nnx.initializers.ones)
    theirs = nnx.Conv(3, 5, (3, 3), **how, rngs=nnx.Rngs(0))
    theirs.kernel.set_value(ours.kernel[...])
    x = np.random.default_rng(0).standard_normal((2, 7, 10, 3)).astype(np.float32)
    found, expected = (answer_of(layer, x) for layer in (ours, theirs))
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1e-2)
    with pytest.raises(TypeError, match="takes no precision"):
        PaddedConvolution(3, 5, 3, precision="highest", compute=compute, rngs=nnx.Rngs(0))


def test_only_a_cpu_gets_products():
    """A TPU's program has the convolution and its own gradients."""
    x, kernel = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32), jax.ShapeDtypeStruct((1, 1, 16, 4), jnp.float32)

    def operations(platform):
        gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(convolution(x, kernel, 1, 1) ** 2), argnums=(0, 1)))
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert operations("tpu") == (3, 0) and operations("cpu") == (0, 3)

"""Operations against counts by hand, and against XLA's where it counts everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks.model_flops import matmul_flops
from deperceiver_jax.sharding import make_mesh

WEIGHT = jnp.ones((4, 4))
PRODUCT = 2 * 3 * 4 * 4  # of a [3, 4] and WEIGHT


def _count(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments))


def test_a_scan_counts_as_often_as_it_runs():
    def five_times(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ WEIGHT), None), x, None, length=5)[0]

    x = jnp.ones((3, 4))
    assert _count(five_times, x) == 5 * PRODUCT
    assert _count(jax.jit(lambda x: five_times(five_times(x) @ WEIGHT)), x) == 11 * PRODUCT
    # The gradient of each product is one product more, as the weight is fixed.
    assert _count(jax.grad(lambda x: jnp.sum(five_times(x))), x) == 10 * PRODUCT
    # What a checkpoint computes again counts again.
    assert _count(jax.grad(lambda x: jnp.sum(jax.checkpoint(five_times)(x))), x) == 15 * PRODUCT


def test_the_cheapest_branch_counts_and_every_device_does():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ WEIGHT @ WEIGHT, lambda x: x @ WEIGHT, x)

    assert _count(branches, jnp.ones((3, 4))) == PRODUCT
    images = PartitionSpec("data")
    on_each = jax.shard_map(lambda x: x @ WEIGHT, mesh=make_mesh(), in_specs=images, out_specs=images)
    assert _count(on_each, jnp.ones((24, 4))) == 8 * PRODUCT


def test_batched_products_count_each_of_the_batch():
    assert _count(lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), jnp.ones((2, 3, 5, 4)), jnp.ones((2, 3, 7, 4))) == (
        2 * (2 * 3 * 5 * 7) * 4
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)

    x, kernel = jnp.ones((2, 8 * stride, 8 * stride, 6)), jnp.ones((stride, stride, 6, 10))
    forward = 2 * (2 * 8 * 8 * 10) * (stride * stride * 6)
    assert _count(convolve, x, kernel) == forward
    gradients = jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2), argnums=(0, 1))
    # Both gradients cost as much as the convolution; the one of a strided input pads it, and padding counts.
    assert 3 * forward <= _count(gradients, x, kernel) <= 3 * forward * (1.3 if stride > 1 else 1)


def test_xla_counts_the_same_without_loops():
    def two_layers(x, first, second):
        return jnp.sum(jax.nn.relu(x @ first) @ second)

    arguments = jnp.ones((64, 32)), jnp.ones((32, 128)), jnp.ones((128, 16))
    gradient = jax.jit(jax.grad(two_layers, argnums=(0, 1, 2)))
    theirs = gradient.lower(*arguments).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(_count(gradient, *arguments), theirs, rtol=0.2)


def test_kernels_are_refused():
    from jax.experimental import pallas as pl

    def copy(source, target):
        target[...] = source[...]

    kernel = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), interpret=True)
    with pytest.raises(ValueError, match="config.attention"):
        _count(kernel, jnp.ones((8, 8)))

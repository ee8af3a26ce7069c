"""The same sums as JAX's, and which platform gets a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.models.layers.sum_of_products import sum_of_products


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 6), (1, 4, 5, 1), (3, 4, 1, 6)])
def test_it_is_the_sum_of_what_is_multiplied(shape, axis):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape, np.float32) for shape in ((3, 4, 5, 6), shape))
    np.testing.assert_allclose(sum_of_products(x, y, axis), (x * y).sum(axis), rtol=1e-5, atol=1e-5)


def test_only_a_cpu_gets_a_product():
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    traced = jax.jit(lambda x, y: sum_of_products(x, y, -1)).trace(x, x)
    for platform, product in (("cpu", True), ("tpu", False), ("cuda", False)):
        assert ("stablehlo.dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()) == product

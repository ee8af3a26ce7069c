"""Training equal to the official one. `make parity` compares every model of tests/golden/cases.py, in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.depthwise_convolution import convolution
from tests.parity import compare

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def programs_are_let_go():
    """A compiled training step is large, and nothing after it here runs it again."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "name, parts",
    [
        ("detr_small_pre_norm_learned", {"optimized": False}),
        ("deperceiver_small", {"steps": 2}),  # its backbone is not small, and takes seconds a step
        ("deformable_small_two_stage", {"optimized": False}),
        # Its training, which takes a minute to compile, is left to `make parity`.
        ("smca_small_conv", {"steps": 0}),
    ],
)
def test_training_is_the_official_one(name, parts):
    failures = [figure for figure in compare(name, **parts) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)


@pytest.mark.parametrize("size, stride", [(7, 1), (3, 2)])
def test_depthwise_convolution_is_that_of_jax(size, stride):
    """What stands in for it in float64, with its gradients."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 5, 6, 4), (size, size, 1, 4)))
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4)

        def of(convolve):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(convolve(x, kernel, (stride,) * 2, [(size // 2,) * 2] * 2, **options)))

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)

        for ours, theirs in zip(
            jax.tree.leaves(of(convolution)), jax.tree.leaves(of(jax.lax.conv_general_dilated)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)

"""In a detector of bfloat16, what is float32 is multiplied as float32: TPUs and GPUs would do otherwise."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import demo
from deperceiver_jax.models import DETECTORS
from deperceiver_jax.preflight.arithmetic import count
from tests.drawn_arrays import Patches, new_detector


@pytest.mark.parametrize("name", DETECTORS)
def test_exact_products_ask_for_float32(name):
    """Heads, places to look at, Gaussians."""
    config = demo.get_config(name)
    config.precision = "bfloat16"

    def detect(image, valid):
        return new_detector(config, Patches, rngs=nnx.Rngs(0))(image, valid)

    program = jax.make_jaxpr(detect)(jnp.zeros((1, 96, 128, 3)), jnp.ones((1, 96, 128), bool))

    def exact(equation):
        return all(operand.aval.dtype == jnp.float32 for operand in equation.invars[:2])

    def asks(equation):
        return exact(equation) and set(equation.params["precision"] or ()) == {jax.lax.Precision.HIGHEST}

    assert count(program, "cpu", asks) == count(program, "cpu", exact) >= 4

"""In a detector of bfloat16, what is float32 is multiplied as float32: TPUs and GPUs would do otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from deperceiver_jax.models import DETECTORS
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.preflight.arithmetic import count
from tests.drawn_arrays import Patches, abstract_detector


@pytest.mark.parametrize("name", DETECTORS)
def test_exact_products_ask_for_float32(name):
    """Heads, places to look at, Gaussians."""
    config = demo.get_config(name)
    config.precision = "bfloat16"

    skeleton, params, others = take_apart(abstract_detector(config, Patches))
    arguments = np.zeros((1, 96, 128, 3), np.float32), np.ones((1, 96, 128), bool)
    program = jax.make_jaxpr(lambda arrays, *image: skeleton.merge(arrays)(*image))({**params, **others}, *arguments)

    def exact(equation):
        return all(operand.aval.dtype == jnp.float32 for operand in equation.invars[:2])

    def asks(equation):
        return exact(equation) and set(equation.params["precision"] or ()) == {jax.lax.Precision.HIGHEST}

    assert count(program, "cpu", asks) == count(program, "cpu", exact) >= 4

"""Numbers of known keys are those of jax.nn.initializers, and nothing of a detector begins any other way."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models import abstract_detector, build_detector
from deperceiver_jax.models.layers import initializers
from deperceiver_jax.models.layers.layer_stack import LayerStack
from deperceiver_jax.models.layers.linear import linear
from deperceiver_jax.models.skeleton import take_apart
from tests.drawn_arrays import FLOAT32

INITIALIZERS = {
    "uniform": initializers.uniform(-0.3, 0.3),
    "uniform above 0": initializers.uniform(0.0, 1.0),
    "scaled_uniform": initializers.scaled_uniform(1 / 3),
    "normal": initializers.normal(0.02),
    "scaled_normal": initializers.scaled_normal(2.0),
    "truncated_normal": initializers.truncated_normal(0.02),
    "lecun_normal": initializers.lecun_normal(),
}
DETECTORS = [
    "deperceiver:r50_16",
    "deperceiver_plus:r50_multiscale",
    "deformable_detr:r50",
    "deformable_detr:r50_two_stage",
    "detr:r50",
    "smca:r50_multiscale",
    "smca:r50_multiscale_conv",
]


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_numbers_are_jaxs(name):
    """One by one, also where an array takes several chunks; but for what compilers round together."""
    initializer = INITIALIZERS[name]
    longer = (3, 3, 1, initializers.CHUNK // 4 + 1)
    for seed, shape in [(0, (3, 3, 4, 9)), (1, longer)]:
        key = jax.random.key(seed)
        drawn = initializer(key, shape)
        assert isinstance(drawn, np.ndarray) and drawn.dtype == np.float32 and drawn.shape == shape
        np.testing.assert_allclose(drawn, initializer.standard(key, shape, jnp.float32), rtol=3e-7, atol=3e-8)


def test_a_traced_key_gives_the_same_numbers():
    for name, initializer in INITIALIZERS.items():
        traced = jax.jit(lambda key, initializer=initializer: initializer(key, (40, 30)))(jax.random.key(3))
        np.testing.assert_allclose(traced, initializer(jax.random.key(3), (40, 30)), rtol=3e-7, atol=3e-8, err_msg=name)


def test_other_types_are_drawn_as_jax_draws_them():
    for name, initializer in INITIALIZERS.items():
        drawn = initializer(jax.random.key(1), (3, 5), jnp.bfloat16)
        assert drawn.dtype == jnp.bfloat16, name
        np.testing.assert_array_equal(drawn, initializer.standard(jax.random.key(1), (3, 5), jnp.bfloat16))


def test_a_module_with_other_initializers_has_an_abstract_form():
    undrawn = initializers.Undrawn()
    other = nnx.Linear(2, 3, rngs=undrawn)
    assert np.std(other.kernel[...]) > 0 and not np.any(linear(2, 3, dtype=jnp.float32, rngs=undrawn).kernel[...])
    nnx.Dropout(0.5, rngs=undrawn)(np.ones(3, np.float32))
    graphdef, _ = nnx.split(other)
    assert graphdef == nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_stacked_layers_begin_alike_with_known_and_with_traced_keys():
    def stack(rngs):
        return LayerStack(_Layer, 3, 8, compute=FLOAT32, rngs=rngs)

    known = nnx.state(stack(nnx.Rngs(0)))
    traced = jax.jit(lambda: nnx.state(stack(nnx.Rngs(0))))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=3e-8), known, traced)
    kernel = known["layers"]["linear"]["kernel"].get_value()
    assert kernel.shape == (3, 8, 8) and len(np.unique(kernel)) == kernel.size


def test_layers_of_another_generator():
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    kernel = nnx.state(LayerStack(_Layer, 2, 8, compute=FLOAT32, rngs=rngs))["layers"]["linear"]["kernel"].get_value()
    assert len(np.unique(kernel)) == kernel.size


class _Layer(nnx.Module):
    def __init__(self, dim: int, *, compute, rngs):
        self.linear = linear(dim, dim, dtype=compute.dtype, rngs=rngs)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_draws_nothing_with_a_program_of_its_own(name, monkeypatch):
    """Every array comes from an initializer of ours: JAX's would compile one program for each shape.

    The abstract detector has the same arrays.
    """
    module, variant = name.split(":")
    config = importlib.import_module(f"configs.{module}").get_config(variant)
    config.model.num_classes, config.model.embed_dim = 3, 64
    config.model.backbone.update(depth=18, width=8)
    for half in ("encoder", "decoder"):
        if "num_layers" in config.model.get(half, {}):
            config.model[half].num_layers = 2

    with monkeypatch.context() as patch:
        patch.setattr("deperceiver_jax.models.over_arrays", lambda function, detector: detector)  # NumPy's stay so
        skeleton, params, others = take_apart(build_detector(config, rngs=nnx.Rngs(0)))
    abstract = take_apart(abstract_detector(config))
    assert skeleton == abstract[0]
    for real, without in ((params, abstract[1]), (others, abstract[2])):
        assert {path: (x.shape, x.dtype) for path, x in real.items()} == {
            path: (x.shape, x.dtype) for path, x in without.items()
        }
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in without.values())
    assert all(isinstance(x, np.ndarray) for x in params.values())
    spread = [np.std(x) for path, x in params.items() if path.endswith("kernel") and math.prod(x.shape) > 1000]
    assert np.median(spread) > 0

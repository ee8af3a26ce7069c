"""A row of layers that computes its activations again gives the same numbers, and keeps less."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import demo
from deperceiver_jax.models.layers.layer_stack import LayerStack, apply_rematerialized
from deperceiver_jax.models.layers.recorder import record_attention
from tests.drawn_arrays import FLOAT32, abstract_detector


class Layer(nnx.Module):
    """tanh(x W), many times wider inside than outside."""

    def __init__(self, rngs, compute=FLOAT32):
        del compute
        self.into = nnx.Linear(4, 256, rngs=rngs)
        self.out = nnx.Linear(256, 4, rngs=rngs)

    def __call__(self, x, *, dropout_key=None):
        del dropout_key
        return x + jnp.tanh(self.out(jnp.tanh(self.into(x))))


def test_rematerialised_layers_give_the_same_gradient_from_less_memory():
    x = np.random.default_rng(0).standard_normal((64, 4), np.float32)

    def gradient(rematerialize, **how):
        stack = LayerStack(Layer, 6, compute=FLOAT32, rngs=nnx.Rngs(0), **how)
        stack.rematerialize |= rematerialize
        compiled = jax.jit(jax.grad(lambda x: jnp.sum(stack(x) ** 2))).lower(x).compile()
        return compiled(x), compiled.memory_analysis().temp_size_in_bytes

    kept, most = gradient(False)
    for again, least in (gradient(True), gradient(False, keep_inputs=True)):
        np.testing.assert_allclose(again, kept, rtol=1e-5, atol=1e-5)
        assert least < most / 2  # six hidden layers of 64 x 256, or one


def test_layers_that_are_recorded_are_no_loop():
    stack, x = LayerStack(Layer, 3, compute=FLOAT32, rngs=nnx.Rngs(0)), np.ones((2, 4), np.float32)
    looped = jax.jit(lambda x: stack(x, collect=True))(x)
    assert "scan" in str(jax.make_jaxpr(lambda x: stack(x))(x))
    with record_attention(stack):
        assert "scan" not in str(jax.make_jaxpr(lambda x: stack(x))(x))
        np.testing.assert_allclose(jax.jit(lambda x: stack(x, collect=True))(x), looped, rtol=1e-6)


def test_a_rematerialised_layer_keeps_its_arguments_alone():
    layer = Layer(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 4))

    def gradient_and_kept(apply):
        value, gradient = jax.vjp(lambda x: jnp.sum(apply(x) ** 2), x)
        return gradient(jnp.ones_like(value))[0], max(kept.size for kept in jax.tree.leaves(gradient))

    (kept, most), (again, least) = (
        gradient_and_kept(apply) for apply in (layer, lambda x: apply_rematerialized(layer, x))
    )
    np.testing.assert_allclose(again, kept, rtol=1e-5)
    assert (least, most) == (4 * 256, 64 * 256)  # a matrix of the layer's, or what is inside of it


def test_the_config_rematerialises_every_row_of_layers():
    config = demo.get_config("detr")
    config.rematerialize = True
    detector = abstract_detector(config)
    found = [part.rematerialize for _, part in nnx.iter_graph(detector) if isinstance(part, LayerStack)]
    assert len(found) > 4 and all(found)
    image, valid = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1, 64, 64), bool)
    config.rematerialize = False
    plain = abstract_detector(config)

    def checkpoints(detector):
        graphdef, state = nnx.split(detector)
        return str(jax.make_jaxpr(lambda state, *a: nnx.merge(graphdef, state)(*a))(state, image, valid)).count(
            "remat2"
        )

    assert checkpoints(plain) == 0
    assert checkpoints(detector) > 8  # two rows of the transformer; four stages, each a first block and a row

"""Activations whose backward pass keeps little."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Bool

from deperceiver_jax.models.layers.by_platform import target_platform
from deperceiver_jax.models.layers.linear import draw_kept, dropout


def exact_gelu(x: Array, rate: float = 0.0, key: Array | None = None) -> Array:
    """GELU with the error function, as PyTorch's (JAX's own default is a tanh approximation of it), and dropout."""
    return dropout(jax.nn.gelu(x, approximate=False), rate, key)


def relu(x: Array, rate: float = 0.0, key: Array | None = None) -> Array:
    """max(x, 0), and dropout as in linear.py.

    The backward pass reads where to go from the result, which the layer behind keeps anyway. JAX's own keep a mask each
    beside it: 3.7 of the 102.5 GB that a step of Deformable DETR moved (docs/preflight.md).
    """
    kept = draw_kept(x.shape, rate, key)
    return _relu(x, kept, 0.0 if kept is None else rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _relu(x: Array, kept: Bool[Array, "..."] | None, rate: float) -> Array:
    x = jnp.maximum(x, 0)
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0)


def _forward(x, kept, rate):
    result = _relu(x, kept, rate)
    return result, result


def _backward(rate, result, gradient):
    return jnp.where(result > 0, gradient / (1.0 - rate), 0), None


_relu.defvjp(_forward, _backward)


@jax.custom_vjp
def masked_relu(x: Array) -> Array:
    """max(x, 0), whose backward pass keeps a mask: for what a loop over layers carries, which would be kept twice.

    The mask is the result's. JAX's own is of x, which a CPU's compiler then keeps or computes again. It would also
    compute the result again for each operation that takes it, and keep until then what the layers in front of it, back
    to the first, were made of. So there the result is that of a function which XLA must call.
    """
    if target_platform() != "cpu":
        return _positive(x)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(_positive)(x)


def _positive(x):
    return jnp.maximum(x, 0)


def _masked_forward(x):
    result = masked_relu(x)
    return result, result > 0


def _masked_backward(positive, gradient):
    return (jnp.where(positive, gradient, 0),)


masked_relu.defvjp(_masked_forward, _masked_backward)

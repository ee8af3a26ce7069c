"""Where parameters begin: the numbers of jax.nn.initializers, drawn without a program of their own.

A program that draws a detector's hundred arrays takes XLA longer to compile than anything else before the first step,
and it runs once. So where a key is known, and not traced, arrays are filled by one small program, which draws a chunk
of any of them: threefry, JAX's generator, makes every number from the key and the number's place alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHUNK = 2**15  # numbers
SQRT_2 = np.float32(math.sqrt(2))

# Of error functions of normal numbers, of all and of those within 2 of 0, where their deviation is a little less.
ALL = np.nextafter(np.float32(-1), np.float32(0)), np.float32(1)
TRUNCATED = np.float32(-math.erf(math.sqrt(2))), np.float32(math.erf(math.sqrt(2)))
WITHIN_2 = dict(gaussian=True, limit=np.nextafter(np.float32(2), np.float32(0)))
TRUNCATED_DEVIATION = np.float32(0.87962566103423978)

Shape = tuple[int, ...]


class Undrawn(nnx.Rngs):
    """nnx.Rngs for a detector whose shapes matter and whose numbers do not: what is drawn here is zeros.

    Its key is one, for modules that draw with initializers of others.
    """

    def __init__(self):
        super().__init__(_undrawn())

    def params(self) -> jax.Array:
        return _undrawn()


@functools.cache
def _undrawn() -> jax.Array:
    with jax.ensure_compile_time_eval():  # also where the first detector is made inside a trace
        return jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """(key, shape) -> float32: a NumPy array if the key is known; else, or of another type, what `standard` makes.

    A number is scale(shape) * x, where x is uniform in [low, high), or, if it is `gaussian`, what the uniform number is
    the error function of, times the root of 2, and not beyond `limit`.
    """

    standard: Callable[..., jax.Array]  # of jax.nn.initializers, or like one
    low: np.float32
    high: np.float32
    scale: Callable[[Shape], float]
    gaussian: bool = False
    limit: float = math.inf

    def __call__(self, key: jax.Array, shape: Shape, dtype=jnp.float32, out_sharding=None) -> Any:
        if key is _undrawn():
            return np.zeros(shape, dtype)
        if isinstance(key, jax.core.Tracer) or np.dtype(dtype) != np.float32 or out_sharding is not None:
            return self.standard(key, shape, dtype, out_sharding)
        size, key_data = math.prod(shape), np.asarray(jax.random.key_data(key))
        how = key_data, self.low, self.high, np.float32(self.scale(shape)), self.gaussian, np.float32(self.limit)
        chunks = [_draw_chunk(np.uint32(first), *how) for first in range(0, size, CHUNK)]
        return np.concatenate([np.asarray(chunk) for chunk in chunks])[:size].reshape(shape)


@jax.jit
def _draw_chunk(first, key, low, high, scale, gaussian, limit):
    """Numbers first..first + CHUNK - 1 of an array."""
    places = first + jnp.arange(CHUNK, dtype=jnp.uint32)
    hashed = jax.extend.random.threefry_2x32((key[0], key[1]), jnp.concatenate([jnp.zeros_like(places), places]))
    bits = hashed[:CHUNK] ^ hashed[CHUNK:]
    unit = jax.lax.bitcast_convert_type((bits >> 9) | np.float32(1).view(np.uint32), jnp.float32) - 1  # in [0, 1)
    uniform = jnp.maximum(low, unit * (high - low) + low)
    normal = jnp.clip(SQRT_2 * jax.scipy.special.erfinv(uniform), -limit, limit)
    return jnp.where(gaussian, normal, uniform) * scale


def zeros(key, shape: Shape, dtype=jnp.float32, out_sharding=None) -> np.ndarray:
    return np.zeros(shape, dtype)


def ones(key, shape: Shape, dtype=jnp.float32, out_sharding=None) -> np.ndarray:
    return np.ones(shape, dtype)


def uniform(low: float, high: float) -> Initializer:
    def standard(key, shape, dtype, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, low, high, out_sharding=out_sharding)

    return Initializer(standard, np.float32(low), np.float32(high), lambda shape: 1.0)


def scaled_uniform(variance: float) -> Initializer:
    """Uniform around 0; of `variance` / inputs, where a kernel's last two axes are inputs and outputs."""
    standard = jax.nn.initializers.variance_scaling(variance, "fan_in", "uniform")

    def scale(shape):
        return np.sqrt(3 * np.float32(variance / math.prod(shape[:-1])))

    return Initializer(standard, np.float32(-1), np.float32(1), scale)


def normal(deviation: float) -> Initializer:
    standard = jax.nn.initializers.normal(deviation)
    return Initializer(standard, *ALL, lambda shape: deviation, gaussian=True)


def scaled_normal(variance: float) -> Initializer:
    """Normal, of `variance` / outputs; a kernel's outputs are its last axis and its windows."""
    standard = jax.nn.initializers.variance_scaling(variance, "fan_out", "normal")

    def scale(shape):
        return np.sqrt(np.float32(variance / (math.prod(shape) // shape[-2])))

    return Initializer(standard, *ALL, scale, gaussian=True)


def truncated_normal(deviation: float) -> Initializer:
    """Normal, and nowhere beyond two deviations."""
    return Initializer(jax.nn.initializers.truncated_normal(deviation), *TRUNCATED, lambda shape: deviation, **WITHIN_2)


def lecun_normal() -> Initializer:
    """Flax's own: truncated_normal with a variance of 1 / inputs."""

    def scale(shape):
        return np.sqrt(np.float32(1 / math.prod(shape[:-1]))) / TRUNCATED_DEVIATION

    return Initializer(jax.nn.initializers.lecun_normal(), *TRUNCATED, scale, **WITHIN_2)

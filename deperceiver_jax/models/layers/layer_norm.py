"""LayerNorm that keeps its input for the backward pass and nothing else of that size.

Source: Ba et al., "Layer Normalization" (arXiv:1607.06450); the variance takes two passes, as in torch.nn.LayerNorm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """x -> (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Computed in float32 at least, whatever x is; the result is of `dtype`. Automatic differentiation would keep x less
    its mean and the normalised x in float32, four times as much as a bfloat16 x; here the backward pass computes both
    again from x, the mean and the inverse deviation of each row.
    """

    def __init__(self, dim: int, *, epsilon: float = 1e-5, dtype):
        self.scale = nnx.Param(np.ones(dim, np.float32))
        self.bias = nnx.Param(np.zeros(dim, np.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return _normalize(x, self.scale[...], self.bias[...], self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(x, scale, bias, epsilon, dtype):
    return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
    wide = _widen(x)
    mean = jnp.mean(wide, axis=-1)
    centered = wide - mean[..., None]
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1) + epsilon)
    y = centered * (inverse[..., None] * _row(scale, x)) + _row(bias, x)
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(epsilon, dtype, kept, gradient):
    x, scale, bias, mean, inverse = kept

    def parts(gradient):
        gradient = _widen(gradient)
        return gradient, gradient * _row(scale, x), (_widen(x) - mean[..., None]) * inverse[..., None]

    _, scaled, normed = parts(gradient)
    means = jnp.mean(scaled, axis=-1), jnp.mean(scaled * normed, axis=-1)
    # Sums over columns and over rows in one loop are more than the TPU's compiler can tile at 4 x 17,472 rows (libtpu
    # 0.0.51 aborts); the barrier puts the sums over columns into the loop that writes the gradient of x.
    gradient, *means = jax.lax.optimization_barrier((gradient, *means))
    gradient, scaled, normed = parts(gradient)
    of_x = (scaled - means[0][..., None] - normed * means[1][..., None]) * inverse[..., None]
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = jnp.sum(gradient * normed, axis=rows), jnp.sum(gradient, axis=rows)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_normalize.defvjp(_forward, _backward)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(parameter, x):
    """With as many axes as x."""
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)

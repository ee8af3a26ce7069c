"""Linear layers with the defaults of the published models, which are PyTorch's, not Flax's."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.initializers import scaled_uniform, uniform, zeros

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch.nn.Linear and Conv2d start here (kaiming_uniform with a = sqrt 5).
torch_kernel_init = scaled_uniform(1 / 3)


def torch_bias_init(fan_in: int):
    """The bias that goes with `torch_kernel_init`: the same uniform range."""
    return uniform(-(fan_in**-0.5), fan_in**-0.5)


def xavier_uniform_init(fan_in: int, fan_out: int):
    """U(-b, b) with b = sqrt(6 / (fan_in + fan_out)), for matrices that are parts of a larger one of these fans."""
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return uniform(-bound, bound)


def torch_start(fan_in: int, fan_out: int = 0) -> dict:
    """Kernel and bias of a layer that starts as PyTorch's do, whatever its `fan_out`."""
    del fan_out
    return dict(kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in))


def xavier_start(fan_in: int, fan_out: int) -> dict:
    """Kernel and bias of a layer that starts Xavier-uniformly, with a bias of zero."""
    return dict(kernel_init=xavier_uniform_init(fan_in, fan_out), bias_init=zeros)


def linear(in_dim: int, out_dim: int, *, dtype, rngs: nnx.Rngs, **start) -> nnx.Linear:
    """A linear layer that starts as torch.nn.Linear does unless told; float32 parameters, computing in `dtype`.

    Applied to [B, H, W, C] features it is the 1x1 convolution of the published models, with the same start.
    start: kernel_init, bias_init or both, and what else nnx.Linear takes.
    """
    return nnx.Linear(in_dim, out_dim, **{**torch_start(in_dim), **start}, dtype=dtype, rngs=rngs)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1/(1 - rate); no key, no dropout."""
    return drop(x, draw_kept(x.shape, rate, key), rate)


def drop(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    """`dropout` that leaves what is `kept`."""
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def draw_kept(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> jax.Array | None:
    """Which elements `dropout` leaves; None where it leaves all."""
    if key is None or rate == 0.0:
        return None
    cpu, default = (functools.partial(how, tuple(shape), rate) for how in (_draw_in_twos, _draw))
    # Without the barrier a TPU's compiler draws the numbers inside of the matrix products that use them, and takes 2.5
    # times as long to compile an attention with dropout (DETR's, v5e).
    return jax.lax.optimization_barrier(by_platform(key, cpu=cpu, default=default))


def _draw(shape, rate, key):
    return jax.random.bernoulli(key, 1.0 - rate, shape)


def _draw_in_twos(shape, rate, key):
    """Two elements of the last axis share 32 bits, whose drawing takes a CPU up to a tenth of a step.

    The rate counts in 65,536ths.
    """
    *before, last = shape
    bits = jax.random.bits(key, (*before, -(-last // 2)), jnp.uint32)
    least = round(rate * 2**16)
    return jnp.concatenate([bits & 0xFFFF >= least, bits >> 16 >= least], axis=-1)[..., :last]


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` independent keys, or `num` times None where there is none (evaluation)."""
    return [None] * num if key is None else list(jax.random.split(key, num))

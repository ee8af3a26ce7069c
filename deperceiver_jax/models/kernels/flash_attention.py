"""Attention for TPUs that never writes its matrix to memory, by the Pallas kernels of flash_kernels.py.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2. Arrays are transposed, with positions on the last axis:
a head of DETR has 32 channels, which would leave three quarters of a TPU's 128 lanes and of the memory empty.
A mask is one more channel: 0 or MASKED in the keys, 1 in the queries. As an array of its own it would have one number
in a row of 128, and be read for every head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.models.kernels.flash_kernels import MASKED, forward_kernel, key_kernel, query_kernel
from deperceiver_jax.models.kernels.log_gaussian import LogGaussian
from deperceiver_jax.models.kernels.pallas import LANES, SUBLANES, call_in_blocks

BLOCKS = (512, 256, LANES)  # positions that a kernel takes at a time
RESULTS = "results of flash attention"  # their name for what jax.checkpoint keeps
KINDS_OF_BIASES = ("", "b", "qp")  # by their number; see call_in_blocks


def flash_attention(
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None = None,
    bias: Float[Array, "B Hb Qb K"] | LogGaussian | None = None,
    seeds: Int32[Array, "B H"] | None = None,
    *,
    dropout_rate: float = 0.0,
) -> Float[Array, "B H Q E"]:
    """`dense_attention` on one TPU. Lengths are padded to whole blocks, with masked keys.

    A LogGaussian is computed block by block. `seeds`, where there is dropout, decide what each head drops.
    """
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    block_q, block_k = block_size(num_queries), block_size(num_keys)
    if key_valid is None and num_keys % block_k:
        key_valid = jnp.ones((batch, num_keys), bool)
    query, key, value = query * width**-0.5, _pad(key, 2, block_k), _pad(value, 2, block_k)
    if key_valid is not None:
        query, key = _with_mask(query, key, _pad(key_valid, 1, block_k))
    query = _pad(query.swapaxes(2, 3), 3, block_q)
    key, value = key.swapaxes(2, 3), value.swapaxes(2, 3)
    if isinstance(bias, LogGaussian):
        biases = _spots(bias, block_q), _places(bias, block_k)
    elif bias is not None:
        bias = jnp.broadcast_to(bias, (batch, heads, num_queries, num_keys)).swapaxes(2, 3)
        biases = (_pad(_pad(bias, 2, block_k), 3, block_q),)
    else:
        biases = ()
    if not dropout_rate:
        seeds = None
    elif seeds is not None:
        seeds = jnp.broadcast_to(seeds[:, :, None, None], (batch, heads, 1, LANES))
    attended = _attention(query, key, value, biases, seeds, block_q, block_k, dropout_rate)
    return attended[..., :num_queries].swapaxes(2, 3)


def block_size(length: int) -> int:
    """The largest block that pads a row of this length by a quarter at most, or else the smallest."""
    return next((block for block in BLOCKS if -length % block <= length // 4), LANES)


def _with_mask(query, key, key_valid):
    """Queries and keys with channels whose product is MASKED where a key is padding, else 0."""
    channels = 32 // query.dtype.itemsize  # what a row of registers holds
    first = jnp.arange(channels)[None, None, None] == 0
    mask = jnp.where(first & ~key_valid[:, None, :, None], MASKED, 0.0)
    ones = jnp.broadcast_to(first, (*query.shape[:3], channels)).astype(query.dtype)
    mask = jnp.broadcast_to(mask, (*key.shape[:3], channels)).astype(key.dtype)
    return jnp.concatenate([query, ones], axis=3), jnp.concatenate([key, mask], axis=3)


def _spots(gaussian: LogGaussian, block_q: int) -> Float[Array, "B H 8 Q"]:
    """What a kernel needs of each query: 1 / width along x and y, and the centre in those units."""
    inverse_width = gaussian.inverse_width
    spots = jnp.concatenate([inverse_width, gaussian.center * inverse_width], axis=3)
    return _pad(_pad(spots, 3, SUBLANES).swapaxes(2, 3), 3, block_q)


def _places(gaussian: LogGaussian, block_k: int) -> Float[Array, "B 1 8 K"]:
    """x and y of each key, the same for all heads."""
    return _pad(_pad(gaussian.place[:, None], 3, SUBLANES).swapaxes(2, 3), 3, block_k)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    return jnp.pad(x, [(0, -x.shape[a] % multiple if a == axis else 0) for a in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
    query: Float[Array, "B H D Q"],
    key: Float[Array, "B H D K"],
    value: Float[Array, "B H E K"],
    biases: tuple[Array, ...],
    seeds: Int32[Array, "B H 1 128"] | None,
    block_q: int,
    block_k: int,
    rate: float,
) -> Float[Array, "B H E Q"]:
    """Of scaled queries. Lengths are multiples of the blocks. `biases`: none, a map [B H K Q], or (spots, places)."""
    return _forward(query, key, value, biases, seeds, block_q, block_k, rate)[0]


def _forward(query, key, value, biases, seeds, block_q, block_k, rate):
    """(attended, what the backward pass needs): the last of it each query's logarithm of a sum of exponentials."""
    value_dim = value.shape[2]
    drawn, kind_of_seeds = ((), "") if seeds is None else ((seeds,), "s")
    attended, lse = call_in_blocks(
        functools.partial(forward_kernel, num_biases=len(biases), rate=rate),
        (query, key, value, *biases, *drawn),
        "qkk" + KINDS_OF_BIASES[len(biases)] + kind_of_seeds,
        [(value_dim, query.dtype, "q"), (1, jnp.float32, "q")],
        scratch=[(1, "q"), (1, "q"), (value_dim, "q")],
        blocks=(block_q, block_k),
        keys_inside=True,
        flops=2 * 2 * value_dim,
        transcendentals=1,
    )
    attended, lse = (checkpoint_name(x, RESULTS) for x in (attended, lse))
    return attended, (query, key, value, biases, seeds, attended, lse)


def _backward(block_q, block_k, rate, kept, gradient):
    query, key, value, biases, seeds, attended, lse = kept
    drawn, kind_of_seeds = ((), "") if seeds is None else ((seeds,), "s")
    delta = jnp.sum(attended.astype(jnp.float32) * gradient.astype(jnp.float32), axis=2, keepdims=True)
    kinds = KINDS_OF_BIASES[len(biases)]
    inputs = (query, key, value, *biases, *drawn, gradient, lse, delta)
    width, value_dim = query.shape[2], value.shape[2]
    options: dict = dict(blocks=(block_q, block_k), flops=5 * 2 * value_dim, transcendentals=1)
    of_bias = [(x.shape[2], x.dtype, kind) for x, kind in zip(biases, kinds, strict=True) if kind != "p"]
    d_query, *d_biases = call_in_blocks(
        functools.partial(query_kernel, num_biases=len(biases), rate=rate),
        inputs,
        f"qkk{kinds}{kind_of_seeds}qqq",
        [(width, query.dtype, "q"), *of_bias],
        scratch=[(width, "q"), *((rows, "q") for rows, _, kind in of_bias if kind == "q")],
        keys_inside=True,
        **options,
    )
    d_key, d_value = call_in_blocks(
        functools.partial(key_kernel, num_biases=len(biases), rate=rate),
        inputs,
        f"qkk{kinds}{kind_of_seeds}qqq",
        [(width, key.dtype, "k"), (value_dim, value.dtype, "k")],
        scratch=[(width, "k"), (value_dim, "k")],
        keys_inside=False,
        **options,
    )
    d_biases += [jnp.zeros_like(x) for x, kind in zip(biases, kinds, strict=True) if kind == "p"]
    return d_query, d_key, d_value, tuple(d_biases), None


_attention.defvjp(_forward, _backward)

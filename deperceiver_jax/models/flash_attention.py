"""Attention for TPUs that never writes its matrix to memory: three Pallas kernels, forward and backward.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2. Arrays are transposed, with positions on the last axis:
a head of DETR has 32 channels, which would leave three quarters of a TPU's 128 lanes and of the memory empty.
Statistics of a query are then rows, and sums over keys run down the lanes. A mask is one more channel: 0 or MASKED in
the keys, 1 in the queries. As an array of its own it would have one number in a row of 128, and be read for every head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

LANES = 128
BLOCKS = (512, 256, LANES)  # positions that a kernel takes at a time
MASKED = -1e30


def flash_attention(
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None = None,
    bias: Float[Array, "B Hb Qb K"] | None = None,
) -> Float[Array, "B H Q E"]:
    """`dense_attention` on one TPU, without dropout. Lengths are padded to whole blocks, with masked keys."""
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
    if bias is not None:
        bias = jnp.broadcast_to(bias, (batch, heads, num_queries, num_keys)).swapaxes(2, 3)
        bias = _pad(_pad(bias, 2, block_k), 3, block_q)
    attended = _attention(query, key, value, bias, block_q, block_k)
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


def _pad(x: Array, axis: int, multiple: int) -> Array:
    return jnp.pad(x, [(0, -x.shape[a] % multiple if a == axis else 0) for a in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: Float[Array, "B H D Q"],
    key: Float[Array, "B H D K"],
    value: Float[Array, "B H E K"],
    bias: Float[Array, "B H K Q"] | None,
    block_q: int,
    block_k: int,
) -> Float[Array, "B H E Q"]:
    """Of scaled queries. Lengths are multiples of the blocks."""
    return _forward(query, key, value, bias, block_q, block_k)[0]


def _forward(query, key, value, bias, block_q, block_k):
    """(attended, what the backward pass needs): the last of it each query's logarithm of a sum of exponentials."""
    value_dim = value.shape[2]
    attended, lse = _call(
        _forward_kernel,
        (query, key, value, bias),
        "qkkb",
        [(value_dim, query.dtype, "q"), (1, jnp.float32, "q")],
        scratch=[(1, block_q), (1, block_q), (value_dim, block_q)],
        blocks=(block_q, block_k),
        keys_inside=True,
        products=2,
    )
    return attended, (query, key, value, bias, attended, lse)


def _backward(block_q, block_k, kept, gradient):
    query, key, value, bias, attended, lse = kept
    delta = jnp.sum(attended.astype(jnp.float32) * gradient.astype(jnp.float32), axis=2, keepdims=True)
    inputs = (query, key, value, bias, gradient, lse, delta)
    width, value_dim = query.shape[2], value.shape[2]
    options = dict(blocks=(block_q, block_k), products=5)
    of_bias = [] if bias is None else [(None, bias.dtype, "b")]
    query_outputs = [(width, query.dtype, "q"), *of_bias]
    d_query, *d_bias = _call(
        _query_kernel, inputs, "qkkbqqq", query_outputs, scratch=[(width, block_q)], keys_inside=True, **options
    )
    d_key, d_value = _call(
        _key_kernel,
        inputs,
        "qkkbqqq",
        [(width, key.dtype, "k"), (value_dim, value.dtype, "k")],
        scratch=[(width, block_k), (value_dim, block_k)],
        keys_inside=False,
        **options,
    )
    return d_query, d_key, d_value, d_bias[0] if d_bias else None


_attention.defvjp(_forward, _backward)


def _call(kernel, inputs, kinds, outputs, *, scratch, blocks, keys_inside, products):
    """Runs `kernel` over images, heads and blocks of queries and keys, the keys innermost or the queries.

    Kinds of arrays: q has queries on its last axis, k keys, b is [B, H, K, Q].
    """
    query, key, value, bias = inputs[:4]
    batch, heads, _, num_queries = query.shape
    num_keys = key.shape[3]
    block_q, block_k = blocks

    def spec(kind, rows):
        def place(b, h, outer, inner):
            i, j = (outer, inner) if keys_inside else (inner, outer)
            return {"q": (b, h, 0, i), "k": (b, h, 0, j), "b": (b, h, j, i)}[kind]

        shape = {"q": (1, 1, rows, block_q), "k": (1, 1, rows, block_k), "b": (1, 1, block_k, block_q)}
        return pl.BlockSpec(shape[kind], place)

    def reads(kind):  # what runs inside is read again for every block outside, unless it is a single block
        inside, (outer_steps, inner_steps) = "k" if keys_inside else "q", grid if keys_inside else grid[::-1]
        return outer_steps if kind == inside and inner_steps > 1 else 1

    def shape(rows, kind):
        return (batch, heads, num_keys if kind == "b" else rows, num_keys if kind == "k" else num_queries)

    given = [(x, kind) for x, kind in zip(inputs, kinds, strict=True) if x is not None]
    grid = (num_queries // block_q, num_keys // block_k)
    results = [jax.ShapeDtypeStruct(shape(rows, kind), dtype) for rows, dtype, kind in outputs]
    pairs = batch * heads * num_queries * num_keys
    moved = sum(reads(kind) * x.size * x.dtype.itemsize for x, kind in given)
    moved += sum(x.size * x.dtype.itemsize for x in results)
    return pl.pallas_call(
        functools.partial(kernel, has_bias=bias is not None),
        grid=(batch, heads, *(grid if keys_inside else grid[::-1])),
        in_specs=[spec(kind, x.shape[2]) for x, kind in given],
        out_specs=[spec(kind, rows) for rows, _, kind in outputs],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(block, jnp.float32) for block in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * value.shape[2], transcendentals=pairs, bytes_accessed=moved
        ),
    )(*(x for x, _ in given))


def _dot(a, b, axis_a: int, axis_b: int):
    """The product of two matrices, summed over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _logits(query, key, bias):
    """[keys, queries]"""
    logits = _dot(key[0, 0], query[0, 0], 0, 0)
    return logits if bias is None else logits + bias[0, 0].astype(jnp.float32)


def _steps(has_bias: bool, refs):
    """The arguments of a kernel with None for the bias that is not there."""
    return refs if has_bias else (*refs[:3], None, *refs[3:])


def _forward_kernel(*refs, has_bias):
    query, key, value, bias, attended, lse, top, total, sums = _steps(has_bias, refs)
    step = pl.program_id(3)

    @pl.when(step == 0)
    def start():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    logits = _logits(query, key, bias)
    new_top = jnp.maximum(top[...], jnp.max(logits, axis=0, keepdims=True))
    weights = jnp.exp(logits - new_top)
    shrink = jnp.exp(top[...] - new_top)
    top[...] = new_top
    total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    sums[...] = sums[...] * shrink + _dot(value[0, 0], weights.astype(value.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        nothing = (top[...] < MASKED / 2) | (total[...] == 0.0)  # no key of this query is real
        safe = jnp.where(nothing, 1.0, total[...])
        attended[0, 0] = jnp.where(nothing, 0.0, sums[...] / safe).astype(attended.dtype)
        lse[0, 0] = jnp.where(nothing, -MASKED, top[...] + jnp.log(safe))  # then every probability is 0


def _probabilities_and_gradient(query, key, value, bias, gradient, lse, delta):
    """(probabilities, gradient of the logits), both [keys, queries]."""
    probabilities = jnp.exp(_logits(query, key, bias) - lse[0, 0])
    return probabilities, probabilities * (_dot(value[0, 0], gradient[0, 0], 0, 0) - delta[0, 0])


def _query_kernel(*refs, has_bias):
    query, key, value, bias, gradient, lse, delta, d_query, *d_bias, sums = _steps(has_bias, refs)
    step = pl.program_id(3)

    @pl.when(step == 0)
    def start():
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    _, d_logits = _probabilities_and_gradient(query, key, value, bias, gradient, lse, delta)
    if d_bias:
        d_bias[0][0, 0] = d_logits.astype(d_bias[0].dtype)
    sums[...] += _dot(key[0, 0], d_logits.astype(key.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        d_query[0, 0] = sums[...].astype(d_query.dtype)


def _key_kernel(*refs, has_bias):
    query, key, value, bias, gradient, lse, delta, d_key, d_value, key_sums, value_sums = _steps(has_bias, refs)
    step = pl.program_id(3)

    @pl.when(step == 0)
    def start():
        key_sums[...] = jnp.zeros(key_sums.shape, jnp.float32)
        value_sums[...] = jnp.zeros(value_sums.shape, jnp.float32)

    probabilities, d_logits = _probabilities_and_gradient(query, key, value, bias, gradient, lse, delta)
    key_sums[...] += _dot(query[0, 0], d_logits.astype(query.dtype), 1, 1)
    value_sums[...] += _dot(gradient[0, 0], probabilities.astype(gradient.dtype), 1, 1)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        d_key[0, 0] = key_sums[...].astype(d_key.dtype)
        d_value[0, 0] = value_sums[...].astype(d_value.dtype)

"""What the Pallas kernels share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

SUBLANES = 8  # rows of a register of float32, of which small arrays are padded to a multiple
LANES = 128  # its columns


def dot(a, b, axis_a: int, axis_b: int, *, precision=None):
    """The product of two matrices, summed over one axis of each, in float32."""
    axes = ((axis_a,), (axis_b,)), ((), ())
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def call_in_blocks(
    kernel: Callable,
    inputs: Sequence[Array],
    kinds: str,
    outputs: Sequence[tuple],
    *,
    scratch: Sequence[tuple[int, str]],
    blocks: tuple[int, int],
    keys_inside: bool,
    flops: int,
    transcendentals: int,
) -> list[Array]:
    """Runs `kernel` over images, heads and blocks of queries and keys, the keys innermost or the queries.

    Kinds of arrays: q has queries on its last axis, k keys, p keys and no heads, b is [B, H, K, Q], s is a row of LANES
    for each head. outputs: (rows, type, kind) of each; scratch: (rows, kind), one block of float32 each. flops,
    transcendentals: of a query and a key.
    """
    given = list(zip(inputs, kinds, strict=True))
    batch, heads, _, num_queries = next(x.shape for x, kind in given if kind == "q")
    num_keys = next(x.shape[3] for x, kind in given if kind == "k")
    block_q, block_k = blocks
    grid = (num_queries // block_q, num_keys // block_k)
    outer_steps, inner_steps = grid if keys_inside else grid[::-1]

    def spec(kind, rows):
        def place(b, h, outer, inner):
            i, j = (outer, inner) if keys_inside else (inner, outer)
            places = {"q": (b, h, 0, i), "k": (b, h, 0, j), "p": (b, 0, 0, j), "b": (b, h, j, i), "s": (b, h, 0, 0)}
            return places[kind]

        of_keys = (1, 1, rows, block_k)
        shape = {"q": (1, 1, rows, block_q), "k": of_keys, "p": of_keys, "b": (1, 1, block_k, block_q)}
        shape["s"] = (1, 1, rows, LANES)
        return pl.BlockSpec(shape[kind], place)

    def reads(kind):  # what runs inside is read again for every block outside, unless it is a single block
        each_head = heads if kind == "p" and num_keys > block_k else 1
        return each_head * (outer_steps if kind in ("kp" if keys_inside else "q") and inner_steps > 1 else 1)

    def shape(rows, kind):
        return (batch, heads, num_keys if kind == "b" else rows, num_keys if kind == "k" else num_queries)

    results = [jax.ShapeDtypeStruct(shape(rows, kind), dtype) for rows, dtype, kind in outputs]
    pairs = batch * heads * num_queries * num_keys
    moved = sum(reads(kind) * x.size * x.dtype.itemsize for x, kind in given)
    moved += sum(x.size * x.dtype.itemsize for x in results)
    return pl.pallas_call(
        kernel,
        grid=(batch, heads, outer_steps, inner_steps),
        in_specs=[spec(kind, x.shape[2]) for x, kind in given],
        out_specs=[spec(kind, rows) for rows, _, kind in outputs],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((rows, block_k if kind == "k" else block_q), jnp.float32) for rows, kind in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=flops * pairs, transcendentals=transcendentals * pairs, bytes_accessed=moved
        ),
    )(*inputs)

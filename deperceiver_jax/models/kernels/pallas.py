"""What the Pallas kernels share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

SUBLANES = 8  # rows of a register of float32, of which small arrays are padded to a multiple
LANES = 128  # its columns
HELD = 8 * 2**20  # bytes of on-chip memory for arrays that are held whole: half of what a kernel is given


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

    What runs inside is held whole, and read once for each head, if it takes at most HELD bytes. Else its blocks are
    read again for every block outside.
    """
    given = list(zip(inputs, kinds, strict=True))
    batch, heads, _, num_queries = next(x.shape for x, kind in given if kind == "q")
    num_keys = next(x.shape[3] for x, kind in given if kind == "k")
    block_q, block_k = blocks
    grid = (num_queries // block_q, num_keys // block_k)
    outer_steps, inner_steps = grid if keys_inside else grid[::-1]
    inside, block_inside = ("kp", block_k) if keys_inside else ("q", block_q)
    needed = sum(_bytes_on_chip(x) for x, kind in given if kind in inside)
    held = inside if outer_steps > 1 and inner_steps > 1 and needed <= HELD else ""

    def at_step(*refs):
        """`kernel`, with this step's blocks of what is held."""
        step = pl.ds(pl.multiple_of(pl.program_id(3) * block_inside, block_inside), block_inside)
        blocks = [
            ref.at[:, :, :, step] if kind in held else ref for ref, kind in zip(refs[: len(kinds)], kinds, strict=True)
        ]
        kernel(*blocks, *refs[len(kinds) :])

    def spec(kind, rows):
        def place(b, h, outer, inner):
            inner = 0 if kind in held else inner
            i, j = (outer, inner) if keys_inside else (inner, outer)
            places = {"q": (b, h, 0, i), "k": (b, h, 0, j), "p": (b, 0, 0, j), "b": (b, h, j, i), "s": (b, h, 0, 0)}
            return places[kind]

        of_keys = (1, 1, rows, num_keys if kind in held else block_k)
        of_queries = (1, 1, rows, num_queries if kind in held else block_q)
        shape = {"q": of_queries, "k": of_keys, "p": of_keys, "b": (1, 1, block_k, block_q)}
        shape["s"] = (1, 1, rows, LANES)
        return pl.BlockSpec(shape[kind], place, pipeline_mode=pl.Buffered(1) if kind in held else None)

    def reads(kind):  # what runs inside is read again for every block outside, unless it is held or a single block
        if kind in held:
            return 1
        each_head = heads if kind == "p" and num_keys > block_k else 1
        return each_head * (outer_steps if kind in inside and inner_steps > 1 else 1)

    def shape(rows, kind):
        return (batch, heads, num_keys if kind == "b" else rows, num_keys if kind == "k" else num_queries)

    results = [jax.ShapeDtypeStruct(shape(rows, kind), dtype) for rows, dtype, kind in outputs]
    pairs = batch * heads * num_queries * num_keys
    moved = sum(reads(kind) * x.size * x.dtype.itemsize for x, kind in given)
    moved += sum(x.size * x.dtype.itemsize for x in results)
    return pl.pallas_call(
        at_step if held else kernel,
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


def _bytes_on_chip(x: Array) -> int:
    """Of one image and head, with rows filled up to whole registers."""
    rows = SUBLANES * 4 // x.dtype.itemsize
    return -(-x.shape[2] // rows) * rows * x.shape[3] * x.dtype.itemsize

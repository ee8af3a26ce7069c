"""Counted operations, bytes and searches, against answers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deperceiver_jax.preflight.arithmetic import count_flops
from deperceiver_jax.preflight.hlo_traffic import Traffic, array_bytes, program_traffic
from deperceiver_jax.preflight.parts import NOWHERE, Part, memory_by_part
from deperceiver_jax.preflight.program import Cost, needed_bytes, reason
from deperceiver_jax.preflight.search import largest_batch
from deperceiver_jax.sharding import make_mesh


def flops(function, *arrays, platform="cpu"):
    return count_flops(jax.make_jaxpr(function)(*arrays), platform)


def test_products_in_loops_and_branches():
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 5))
    product = 2 * 3 * 5 * 5
    assert flops(lambda a, b: a @ b, a, b) == product
    assert flops(lambda a, b: jax.lax.fori_loop(0, 7, lambda _, x: x @ b, a), a, b) == 7 * product
    assert flops(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), a, b) == product

    def by_platform(a, b):
        return jax.lax.platform_dependent(a, b, tpu=lambda a, b: a @ b @ b, default=jnp.matmul)

    assert flops(by_platform, a, b) == product
    assert flops(by_platform, a, b, platform="tpu") == 2 * product


def test_what_is_computed_again_in_a_loop_knows_its_platform():
    """There the switch comes from outside."""

    def by_platform(a, b):
        return jax.lax.platform_dependent(a, b, tpu=lambda a, b: a @ b @ b, default=jnp.matmul)

    def gradient(step):
        def loss(a):
            return jnp.sum(jax.lax.scan(lambda x, _: (step(x, jnp.sin(x.T @ x)), None), a, length=4)[0] ** 2)

        return jax.grad(loss)

    a, again = jnp.zeros((3, 5)), gradient(jax.checkpoint(by_platform))
    once = flops(gradient(jnp.matmul), a)
    assert flops(again, a) == once and flops(again, a, platform="tpu") > once


def test_convolutions_without_padding_and_holes():
    image, kernel = jnp.zeros((2, 4, 6, 3)), jnp.zeros((3, 3, 3, 8))

    def convolve(image, kernel, **options):
        options = {"window_strides": (1, 1), "padding": "VALID"} | options
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    each = 2 * 2 * 3 * 8  # images, channels in and out
    assert flops(convolve, image, kernel) == each * (2 * 3) * (4 * 3)
    # with a row of zeros around, the outer two of 4 and 6 places miss one of 3 rows
    assert flops(lambda i, k: convolve(i, k, padding="SAME"), image, kernel) == each * (4 * 3 - 2) * (6 * 3 - 2)
    # the gradient of the input is a convolution with as many products, over an array with holes
    strided = flops(lambda i, k: convolve(i, k, window_strides=(2, 2)), image, kernel)
    both = jax.value_and_grad(lambda i: convolve(i, kernel, window_strides=(2, 2)).sum())
    assert flops(both, image) == 2 * strided
    # a linear function's gradient does not need its value, and what nothing needs is not counted
    assert flops(jax.grad(lambda i: convolve(i, kernel, window_strides=(2, 2)).sum()), image) == strided


def test_shapes_with_tiles_and_memory_spaces():
    assert array_bytes("f32[3,5]{1,0}") == 60
    assert array_bytes("bf16[8,2048,32]{2,1,0:T(8,128)(2,1)}") == 8 * 2048 * 128 * 2
    assert array_bytes("bf16[8,2048,32]{1,2,0:T(8,128)(2,1)}") == 8 * 2048 * 32 * 2
    assert array_bytes("f32[16]{0:T(128)S(1)}") == 0
    assert array_bytes("f32[16]{0:T(128)S(1)}", everywhere=True) == 512
    assert array_bytes("(pred[7]{0}, (s32[], u8[2]{0}))") == 7 + 4 + 2


def test_another_refusal_is_one_sentence():
    message = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
    message += "allocating on stack for %fusion.5 = (f32[256]{0:T(256)S(1)}, bf16[4,256]) fusion(%copy-done.98)"
    assert needed_bytes(message) is None
    assert reason(message) == "Ran out of memory in memory space vmem while allocating on stack for %fusion.5."
    assert reason("INTERNAL: no.\n\nSee there.") == "INTERNAL: no."


def test_what_the_compiler_says_it_would_have_needed():
    """Sentences of two versions of libtpu."""
    first = "Ran out of memory in memory space hbm. Used 28.25G of 15.75G hbm. Exceeded hbm capacity by 12.5G."
    second = "the total memory required for HLO temporaries (42.50G) exceeds available HBM (15.75G). HLO module: jit_f."
    assert [needed_bytes(first), needed_bytes(second)] == [28.25 * 2**30, 42.5 * 2**30]
    assert needed_bytes("INVALID_ARGUMENT: no such device") is None


def test_a_sharded_program_moves_what_it_must():
    """x [8 n, k] split over 8 devices times w [k, m]; the sum of the squares' gradient of w is added over devices."""
    mesh = make_mesh()
    n, k, m = 16, 32, 64
    x = jax.ShapeDtypeStruct((8 * n, k), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    w = jax.ShapeDtypeStruct((k, m), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    out = NamedSharding(mesh, PartitionSpec())
    product = jax.jit(lambda x, w: x.T @ (x @ w), out_shardings=out).lower(x, w).compile().as_text()
    traffic = program_traffic(product)
    assert traffic.interconnect == 2 * (k * m * 4) * 7 // 8
    least = 4 * (2 * n * k + k * m + 2 * n * m + 3 * k * m)  # x twice, w, x w there and back, the sum in and out
    assert least <= traffic.memory <= least + 4 * (4 * n * k)  # and perhaps a transposed x


def test_a_loop_counts_as_often_as_it_runs():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    weights = jax.ShapeDtypeStruct((10, 64, 64), jnp.float32)

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    memory = program_traffic(jax.jit(layers).lower(x, weights).compile().as_text()).memory
    array = 64 * 64 * 4
    assert 10 * 3 * array <= memory <= 10 * 8 * array  # each layer's slice, input and output; not all the weights


TPU_LOOP = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call"
  %kept = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (q: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %a = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_of_a_tpu_has_its_count_in_its_condition():
    compare = 4 + 4 + 1
    assert program_traffic(TPU_LOOP) == Traffic(5 * (3 * 4096 + compare), 0, 0)


# Frames as XLA writes them: a frame's parent is the number before the one that stands there, 0 for none.
SOURCES = """FileNames
1 "/somewhere/deperceiver_jax/training/train_step.py"
2 "/somewhere/deperceiver_jax/models/detr/transformer.py"
3 "/somewhere/site-packages/flax/nnx/linear.py"
4 "/somewhere/deperceiver_jax/preflight/program.py"

FunctionNames
1 "make_train_step.<locals>.train_step"
2 "Encoder.__call__"
3 "Linear.__call__"
4 "Layer.__call__.<locals>.attend"
5 "compile_step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=19 end_column=78}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=1 end_column=2}
3 {file_name_id=2 function_name_id=4 line=9 end_line=9 column=1 end_column=2}
4 {file_name_id=3 function_name_id=3 line=7 end_line=7 column=1 end_column=2}
5 {file_name_id=4 function_name_id=5 line=40 end_line=40 column=1 end_column=2}

StackFrames
1 {file_location_id=5 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}
4 {file_location_id=3 parent_frame_id=4}
5 {file_location_id=4 parent_frame_id=5}
"""


def test_bytes_belong_to_the_parts_whose_lines_made_them():
    name = 'metadata={op_name="jit(f)/transpose(jvp())/while/body/mul" stack_frame_id=5}'
    named = TPU_LOOP.replace('%x), custom_call_target="tpu_custom_call"', f'%x), custom_call_target="f", {name}')
    named = named.replace("direction=LT", 'direction=LT, metadata={op_name="jit(f)/while/cond/lt" stack_frame_id=2}')
    entry, computations = named.split("\n", 1)
    layer = "Encoder > Layer"
    compare, array = 4 + 4 + 1, 4096
    # the second kernel of the loop has no lines of its own, and takes what the first gives
    assert memory_by_part(f"{entry}\n\n{SOURCES}\n{computations}") == [
        Part(layer, True, 5 * 3 * array),
        Part("the step", False, 5 * compare),
    ]
    taken_later = computations.replace("custom-call(%x)", "custom-call(%y0)").replace(
        "  %y = ", "  %y0 = f32[8,128]{1,0:T(8,128)} copy(%x)\n  %y = "
    )
    parts = memory_by_part(f"{entry}\n\n{SOURCES}\n{taken_later}")
    assert parts[0] == Part(layer, True, 5 * 5 * array)  # a copy of what comes from outside belongs to its taker
    assert memory_by_part(TPU_LOOP) == [Part(NOWHERE, False, program_traffic(TPU_LOOP).memory)]


def test_a_kernel_counts_what_its_author_says_it_reads_again():
    says = 'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1",'
    says += '"bytes_accessed":"40960","remote_bytes_transferred":"0"}}}'
    compare, once = 4 + 4 + 1, 2 * 4096
    told = TPU_LOOP.replace('custom-call(%x), custom_call_target="tpu_custom_call"', f"custom-call(%x), {says}")
    assert program_traffic(told) == Traffic(5 * (40960 + 4096 + compare), 0, 0)
    told = TPU_LOOP.replace('custom-call(%y), custom_call_target="tpu_custom_call"', f"custom-call(%y), {says}")
    assert program_traffic(told) == Traffic(5 * (once + 40960 // 2 + compare), 0, 0)  # its result stays on the chip


def test_a_fusion_within_a_fusion_reads_its_slice_of_a_stack_alone():
    """As libtpu writes a layer's gradient, beside a buffer that it sets aside and that nothing fills."""
    text = """HloModule jit_f

%slicing (p0: f32[6,8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %taken = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%taken)
}

%product (q0: f32[6,8,128], q1: s32[], q2: f32[8,128]) -> f32[8,128] {
  %q0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %layer = f32[8,128]{1,0:T(8,128)} fusion(%q0, %q1), kind=kLoop, calls=%slicing
  ROOT %times = f32[8,128]{1,0:T(8,128)} multiply(%layer, %q2)
}

ENTRY %main (a: f32[6,8,128], b: s32[], c: f32[8,128]) -> f32[8,128] {
  %a = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = s32[]{:S(6)} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} parameter(2)
  %room = f32[6,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = f32[8,128]{1,0:T(8,128)} fusion(%a, %b, %c), kind=kOutput, calls=%product
}
"""
    assert program_traffic(text).memory == 3 * 4096


@pytest.mark.parametrize(
    "groups", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['a'=2,'b'=4] {'b'}", "mesh['a'=8] {'a':(2)4}"]
)
def test_sizes_of_groups(groups):
    text = f"""HloModule jit_f, num_partitions=8

ENTRY %main (a: f32[4,10]) -> f32[16,10] {{
  %a = f32[4,10]{{1,0}} parameter(0)
  %r = f32[4,10]{{1,0}} all-reduce(%a), replica_groups={groups}, to_apply=%add
  ROOT %g = f32[16,10]{{1,0}} all-gather(%r), replica_groups={groups}, dimensions={{0}}
}}
"""
    assert program_traffic(text).interconnect == 2 * 160 * 3 // 4 + 160 * 3


@pytest.mark.parametrize(("slices", "times"), [(2, 1), (4, 1.5)])
def test_what_goes_to_other_slices_goes_round_a_ring_of_them(slices, times):
    """As libtpu 0.0.51 writes the sum of an array over slices: after sums within each, through the hosts."""
    host = 'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = f"""HloModule jit_f, num_partitions=16

ENTRY %main (a: f32[1024,8]) -> f32[1024,8] {{
  %a = f32[1024,8]{{1,0}} parameter(0)
  %t = token[] after-all()
  %s = f32[64,8]{{1,0}} reduce-scatter(%a), replica_groups=[1,16]<=[16], dimensions={{0}}
  %send = (f32[64,8]{{1,0}}, u32[], token[]) send(%s, %t), channel_id=2, {host}
  %recv = (f32[64,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {host}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[64,8]{{1,0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %got = f32[64,8]{{1,0}} get-tuple-element(%recv-done), index=0
  ROOT %g = f32[1024,8]{{1,0}} all-gather(%got), replica_groups=[1,16]<=[16], dimensions={{0}}
}}
"""
    whole, part = 1024 * 8 * 4, 64 * 8 * 4
    traffic = program_traffic(text, slices)
    assert traffic == Traffic((whole + part) + 2 * part + (part + whole), whole * 15 // 16 + part * 15, times * part)


@pytest.mark.parametrize(
    ("fixed", "each", "most"), [(1000, 37, 10**9), (0, 1000, 10**9), (9000, 500, 10**9), (10, 1, 70)]
)
@pytest.mark.parametrize("start", [1, 8, 300])
def test_the_largest_batch_that_fits(fixed, each, most, start):
    tried = []

    def cost_of(images):
        tried.append(images)
        return Cost(fixed, images * each, 0, images <= most, 0.0, 0, 0, 0, 0.0)

    def fits(cost):
        return cost.fits_chip and cost.memory <= 10_000

    expected = max((n for n in range(1, 5000) if n <= most and fixed + n * each <= 10_000), default=0)
    assert largest_batch(cost_of, fits, 10_000, start=start) == expected
    assert len(tried) == len(set(tried)) <= 20

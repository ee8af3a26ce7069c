"""Every way to compute attention equals plain attention, and the choice between them is the documented one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from configs import demo
from deperceiver_jax.errors import UserError
from deperceiver_jax.models import build_detector
from deperceiver_jax.models.attention import choice as attention_choice
from deperceiver_jax.models.attention.choice import chunked_attention, cudnn_attention, cudnn_takes
from deperceiver_jax.models.attention.dense import dense_attention
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.kernels import pallas
from deperceiver_jax.models.kernels.flash_attention import block_size, flash_attention
from deperceiver_jax.models.kernels.log_gaussian import LogGaussian
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.preflight.arithmetic import count
from deperceiver_jax.sharding import batch_sharding, make_mesh
from tests.drawn_arrays import FLOAT32, abstract_detector
from tests.meshes import mesh_on


def arrays(queries=140, keys=200, heads=2, width=8, value_width=16, dtype=jnp.float32):
    """(query, key, value, key_valid): the second image has no valid key."""
    rng = np.random.default_rng(0)
    shapes = ((2, heads, queries, width), (2, heads, keys, width), (2, heads, keys, value_width))
    valid = np.arange(keys)[None] < np.array([keys * 9 // 10, 0])[:, None]
    return *(rng.normal(size=shape).astype(dtype) for shape in shapes), valid


def bias_for(queries, keys, shape):
    return np.random.default_rng(1).normal(size=[2, *shape]).astype(np.float32)


def same_values_and_gradients(attend, query, key, value, valid, bias, tolerance, plain=dense_attention):
    def loss(attend, query, key, value, bias):
        attended = attend(query, key, value, valid, bias).astype(jnp.float32)
        return jnp.sum(jnp.sin(attended)), attended

    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)

    def compute(attend):
        gradient = jax.value_and_grad(functools.partial(loss, attend), argnums=wanted, has_aux=True)
        (_, attended), gradients = jax.device_get(jax.jit(gradient)(query, key, value, bias))
        return attended, *gradients

    for ours, same in zip(jax.tree.leaves(compute(attend)), jax.tree.leaves(compute(plain)), strict=True):
        np.testing.assert_allclose(ours, same, atol=tolerance)
        if valid is not None:
            assert not np.any(ours[1])


def gaussian_for(queries, keys):
    rng = np.random.default_rng(2)
    shapes = ((2, 2, queries, 2), (2, 2, queries, 2), (2, keys, 2))
    return LogGaussian(*(rng.uniform(0.2, 2.0, size=shape).astype(np.float32) for shape in shapes))


@pytest.mark.parametrize("bias_shape", [None, (2, 70, 50), (1, 1, 50), "gaussian"])
def test_blocks_of_queries_equal_plain_attention(monkeypatch, bias_shape):
    monkeypatch.setattr(attention_choice, "BLOCK", 16 * 50)
    monkeypatch.setattr(attention_choice, "FEWEST_QUERIES", 1)  # 70 queries: four blocks of 16 and a part of one
    query, key, value, valid = arrays(queries=70, keys=50)
    if bias_shape == "gaussian":
        bias = gaussian_for(70, 50)
    else:
        bias = None if bias_shape is None else bias_for(70, 50, bias_shape)
    same_values_and_gradients(chunked_attention, query, key, value, valid, bias, 1e-5)


def test_blocks_never_hold_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(attention_choice, "BLOCK", 128 * 1024)
    query, key, value, _ = arrays(queries=1024, keys=1024)

    def temporaries(attend):
        def loss(query, key, value):
            return jnp.sum(attend(query, key, value, None, None) ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = 2 * 2 * 1024 * 1024 * 4  # images, heads, queries, keys, bytes
    assert temporaries(dense_attention) > matrix
    assert temporaries(chunked_attention) < 0.7 * matrix


def test_blocks_drop_with_keys_of_their_own(monkeypatch):
    monkeypatch.setattr(attention_choice, "BLOCK", 8 * 16)
    monkeypatch.setattr(attention_choice, "FEWEST_QUERIES", 1)
    query, key = np.zeros((1, 1, 32, 4), np.float32), np.zeros((1, 1, 16, 4), np.float32)
    value = np.eye(16, dtype=np.float32)[None, None]  # so that the result is the matrix
    drops = dict(dropout_rate=0.5, dropout_key=jax.random.key(0))
    attend = jax.jit(lambda query, key, value: chunked_attention(query, key, value, **drops))
    matrix = np.asarray(attend(query, key, value))[0, 0] * 16
    assert set(np.unique(matrix)) == {0.0, 2.0}
    assert 0.4 < np.mean(matrix == 0) < 0.6
    blocks = matrix.reshape(4, -1)
    assert len({block.tobytes() for block in blocks}) == 4
    np.testing.assert_array_equal(np.asarray(attend(query, key, value))[0, 0] * 16, matrix)


@pytest.mark.parametrize(
    ("bias_shape", "masked", "held"),
    [(None, True, True), ((1, 140, 200), True, True), (None, False, True), ("gaussian", True, True)]
    + [("gaussian", True, False)],
)
def test_kernels_equal_plain_attention(bias_shape, masked, held, monkeypatch):
    """In Pallas' simulation of a TPU. Lengths that no block divides; values of another width than queries; keys, or in
    the backward pass queries, that on-chip memory holds whole, or block by block."""
    if not held:
        monkeypatch.setattr(pallas, "HELD", 0)
    query, key, value, valid = arrays(heads=2 if bias_shape == "gaussian" else 1)
    if bias_shape == "gaussian":
        bias = gaussian_for(140, 200)
    else:
        bias = None if bias_shape is None else bias_for(140, 200, bias_shape)
    with pltpu.force_tpu_interpret_mode():
        same_values_and_gradients(flash_attention, query, key, value, valid if masked else None, bias, 1e-5)


@pytest.mark.parametrize(("room", "reads"), [(2 * 2048 * 8 * 4, 1), (2 * 2048 * 8 * 4 - 1, 2)])
def test_keys_that_fit_on_the_chip_are_read_once(room, reads, monkeypatch):
    """Of two blocks of queries and four of keys: what the kernel says that it moves."""
    monkeypatch.setattr(pallas, "HELD", room)
    query, key = np.zeros((1, 1, 1024, 8), np.float32), np.zeros((1, 1, 2048, 8), np.float32)
    kernels = str(jax.make_jaxpr(lambda q, k, v: flash_attention(q, k, v))(query, key, key))
    moved = [int(found) for found in re.findall(r"bytes_accessed=(\d+)", kernels)]
    assert moved == [4 * (2 * query.size + query.shape[2] + reads * 2 * key.size)]


def murmur_finaliser(x):
    """Of uint32, in NumPy."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def kept_pairs(seeds, queries, keys, rate):
    """[B, H, Q, K] bool"""
    seeds = seeds.view(np.uint32)[:, :, None, None]
    query, key = np.arange(queries, dtype=np.uint32)[:, None], np.arange(keys, dtype=np.uint32)
    of_query = murmur_finaliser(seeds ^ (query * np.uint32(0x9E3779B1)))
    return (murmur_finaliser(of_query + key * np.uint32(0x85EBCA77)) >> 8) >= rate * 2**24


@pytest.mark.parametrize("bias_shape", [None, (1, 140, 200), "gaussian"])
def test_kernels_drop_what_their_hash_says_in_both_passes(bias_shape):
    """Beside plain attention that is given the pairs to keep."""
    query, key, value, valid = arrays()
    bias = gaussian_for(140, 200) if bias_shape == "gaussian" else None
    bias = bias_for(140, 200, bias_shape) if isinstance(bias_shape, tuple) else bias
    rate, seeds = 0.3, np.int32([[5, -7], [11, 2**31 - 1]])
    kept = kept_pairs(seeds, 140, 200, rate)

    def kernels(*arrays):
        return flash_attention(*arrays, seeds, dropout_rate=rate)

    def plain(query, key, value, valid, bias):
        everything = jnp.broadcast_to(jnp.eye(200), (2, 2, 200, 200))  # so that the answer is the matrix
        probabilities = dense_attention(query, key, everything, valid, bias)
        return jnp.einsum("bhqk,bhke->bhqe", jnp.where(kept, probabilities / (1 - rate), 0.0), value)

    with pltpu.force_tpu_interpret_mode():
        same_values_and_gradients(kernels, query, key, value, valid, bias, 1e-5, plain)


@pytest.mark.parametrize(("queries", "keys"), [(128, 4096), (4096, 128)])
def test_pairs_are_dropped_independently(queries, keys):
    """At their rate in every head; no two heads, and no two of the 128 rows or columns, go together."""
    rate = 0.1
    seeds = np.asarray(jax.random.bits(jax.random.key(0), (1, 4), jnp.uint32)).view(np.int32)
    kept = kept_pairs(seeds, queries, keys, rate)[0]
    assert np.all(np.abs(kept.mean(axis=(1, 2)) - 0.9) < 5 * np.sqrt(rate * (1 - rate) / (queries * keys)))
    rows = kept[0] if queries < keys else kept[0].T
    for together, allowed in ((kept.reshape(4, -1), 5), (rows, 6)):
        apart = np.corrcoef(together) - np.eye(len(together))
        assert np.max(np.abs(apart)) < allowed / np.sqrt(together.shape[1])


def test_a_kernel_pads_at_most_a_quarter_beyond_its_smallest_block():
    assert [block_size(length) for length in (2048, 4368, 1092, 900, 300, 100)] == [512, 512, 256, 512, 128, 128]


def choice(implementation, query, key, value, valid=None, bias=None, dropout=0.0, platform="tpu"):
    """What the program has that a large attention compiles to: "kernel", "blocks" or "matrix"."""
    compute = Compute(query.dtype, implementation, rematerialize=False)
    attention = MultiHeadAttention(query.shape[2], 1, dropout=dropout, compute=compute, rngs=nnx.Rngs(0))

    def attend(query, key, value):
        return attention.attend(query, key, value, key_valid=valid, bias=bias, dropout_key=jax.random.key(0))

    text = jax.jit(attend).trace(query, key, value).lower(lowering_platforms=(platform,)).as_text()
    return "kernel" if "tpu_custom_call" in text else "blocks" if "stablehlo.while" in text else "matrix"


def tokens(length, dtype=jnp.bfloat16):
    return np.zeros((1, length, 16), dtype)


def test_choice_by_size_platform_dropout_and_field():
    large, small = [tokens(1024)] * 3, [tokens(512)] * 3
    assert choice("auto", *large) == "kernel"
    assert choice("auto", *large, platform="cpu") == "blocks"
    places = [np.ones(shape, np.float32) for shape in ((1, 1, 1024, 2), (1, 1, 1024, 2), (1, 1024, 2))]
    assert choice("auto", *large, bias=LogGaussian(*places)) == "kernel"
    assert choice("auto", *large, bias=LogGaussian(*places), platform="cpu") == "blocks"
    assert choice("auto", *large, dropout=0.1) == "kernel"
    assert choice("auto", *large, dropout=0.1, platform="cpu") == "blocks"
    assert choice("auto", *small) == "matrix"
    assert choice("xla", *large) == "matrix"
    assert choice("chunked", *large) == "blocks"
    assert choice("flash", *small) == "kernel"
    assert choice("flash", *large, platform="cpu") == "blocks"
    assert choice("cudnn", *large) == "blocks"  # there is no GPU here


def test_a_gaussian_is_computed_in_blocks_or_is_a_map():
    query, key, value, valid = arrays(queries=6, keys=5)
    gaussian = gaussian_for(6, 5)
    both = jax.jit(lambda gaussian: [dense_attention(query, key, value, valid, x) for x in (gaussian, gaussian.map())])
    np.testing.assert_allclose(*both(gaussian), atol=1e-6)
    large = [jax.ShapeDtypeStruct((1, 2, n, 8), jnp.float32) for n in (1024, 1024)]
    pairs = [jax.ShapeDtypeStruct((1, 2, 1024, 2), jnp.float32)] * 2

    def run(query, key, center, inverse_width, place):
        gaussian, drops = LogGaussian(center, inverse_width, place), dict(dropout_rate=0.0, dropout_key=None)
        return attention_choice.attention("auto", query, key, key, None, gaussian, **drops)

    text = jax.jit(run).lower(*large, *pairs, jax.ShapeDtypeStruct((1, 1024, 2), jnp.float32)).as_text()
    assert "1x2x1024x1024x" not in text and "1x2x256x1024x" in text


def test_what_cudnn_takes():
    def takes(dtype=jnp.bfloat16, value_width=32, width=32, queries=64, keys=64, masked=False, bias=None):
        query, key, value, valid = arrays(queries, keys, 1, width, value_width, dtype)
        return cudnn_takes(query, key, value, valid if masked else None, bias)

    assert takes() and takes(masked=True) and takes(queries=63) and takes(jnp.float16)
    assert not takes(jnp.float32)
    assert not takes(value_width=64)
    assert not takes(width=256, value_width=256)
    assert not takes(width=12, value_width=12)
    assert not takes(queries=63, masked=True) and not takes(keys=63, masked=True)
    assert not takes(bias=np.zeros((2, 1, 64, 64), np.float32))


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
def test_cudnn_equals_plain_attention():
    query, key, value, valid = arrays(256, 512, 8, 32, 32, jnp.bfloat16)
    assert cudnn_takes(query, key, value, valid, None)
    same_values_and_gradients(cudnn_attention, query, key, value, valid, None, 3e-2)


@pytest.mark.parametrize("masked", [True, False])
def test_kernels_run_on_each_devices_own_images(masked):
    """A kernel cannot be split by the compiler, so the program for eight TPUs has it inside a manual region."""
    mesh = make_mesh()
    attention = MultiHeadAttention(16, 1, compute=FLOAT32, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((16, 1024, 16), jnp.float32, sharding=batch_sharding(mesh))
    valid = jax.ShapeDtypeStruct((16, 1024), bool, sharding=batch_sharding(mesh)) if masked else None

    def attend(x, valid):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention(x, x, x, key_valid=valid)

    text = jax.jit(attend).trace(x, valid).lower(lowering_platforms=("tpu",)).as_text()
    kernel = next(line for line in text.splitlines() if "tpu_custom_call" in line)
    assert "tensor<2x1x16x1024xf32>" in kernel


@pytest.mark.parametrize("images", [1, 16])
def test_a_bias_of_all_images_goes_to_each_device(images):
    """As that of denoising queries, and of anchors."""
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((16, 1, 1024, 16), jnp.float32, sharding=batch_sharding(mesh))
    bias = jax.ShapeDtypeStruct((images, 1, 1024, 1024), jnp.float32)

    def attend(x, bias):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention_choice.attention("auto", x, x, x, None, bias, dropout_rate=0.0, dropout_key=None)

    text = jax.jit(attend).trace(x, bias).lower(lowering_platforms=("tpu",)).as_text()
    kernel = next(line for line in text.splitlines() if "tpu_custom_call" in line)
    assert "tensor<2x1x1024x1024xf32>" in kernel
    gradient = jax.jit(jax.grad(lambda bias, x: attend(x, bias).sum())).trace(bias, x)
    assert (gradient.lower(lowering_platforms=("tpu",)).as_text().count("all_reduce") > 0) == (images == 1)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_backward_pass_computes_no_kernel_again(devices):
    """It has two of its own. The rest, as padded and transposed keys, is made again."""
    mesh = mesh_on("tpu")
    mesh.abstract_mesh = make_mesh(devices=jax.devices()[:devices]).abstract_mesh
    x, valid = np.zeros((4, 2, 1025, 16), np.float32), np.ones((4, 1025), bool)
    drops = dict(dropout_rate=0.1, dropout_key=jax.random.key(0))

    @traced_for(mesh)
    def gradient(x):
        return jax.grad(lambda x: attention_choice.attention("auto", x, x, x, valid, None, **drops).sum())(x)

    program = jax.make_jaxpr(gradient)(x)
    kernels = count(program, "tpu", lambda equation: int(equation.primitive.name == "pallas_call"))
    assert kernels == 3 * devices


def test_the_config_sets_every_attention_of_a_detector():
    config = demo.get_config("detr")
    config.attention = "chunked"
    detector = abstract_detector(config)
    found = [part.implementation for _, part in nnx.iter_graph(detector) if isinstance(part, MultiHeadAttention)]
    assert found == ["chunked"] * 3
    config.attention = "fast"
    with pytest.raises(UserError, match="config.attention is 'fast'; it can be auto, xla, chunked, cudnn or flash"):
        build_detector(config, rngs=nnx.Rngs(0))

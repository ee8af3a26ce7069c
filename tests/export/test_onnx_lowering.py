"""Every rule of the ONNX writer by itself: onnxruntime computes what JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from onnx import helper

from deperceiver_jax.errors import UserError
from deperceiver_jax.export.onnx_file import IR_VERSION, OPSET
from deperceiver_jax.export.onnx_graph import Graph, Value, full, onnx_type
from deperceiver_jax.export.onnx_lowering import lower
from deperceiver_jax.models.attention.choice import chunked_attention
from deperceiver_jax.models.layers.level_sampling import PORTABLE, sample_cells
from deperceiver_jax.models.layers.max_pool import max_pool

X = np.random.default_rng(0).standard_normal((2, 6, 8), np.float32)
WHOLE = np.arange(-24, 24, dtype=np.int32).reshape(2, 3, 8)
ROWS = np.int32([[3, 0, 5], [1, 1, 2]])
KERNEL = np.random.default_rng(1).standard_normal((3, 3, 4, 6), np.float32)


def run_as_onnx(function, *arrays, symbols=()):
    """Results of `function` by onnxruntime; `symbols`: names for the leading axes of the first array."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    if symbols:
        free = jax.export.symbolic_shape(",".join(symbols))
        shapes[0] = jax.ShapeDtypeStruct((*free, *arrays[0].shape[len(free) :]), arrays[0].dtype)
    closed = jax.make_jaxpr(function)(*shapes)
    graph, names = Graph(), [f"x{i}" for i in range(len(arrays))]
    if symbols:
        shape = graph.add("Shape", "x0")
        for i, symbol in enumerate(symbols):
            graph.symbols[symbol] = graph.add("Slice", shape, graph.integers(i), graph.integers(i + 1))
    arguments = [Value(n, tuple(v.aval.shape)) for n, v in zip(names, closed.jaxpr.invars, strict=True)]
    results = lower(graph, closed.jaxpr, closed.consts, arguments)
    outputs = [graph.name(full(graph, v, a.shape)) for v, a in zip(results, closed.out_avals, strict=True)]
    body = helper.make_graph(
        graph.nodes,
        "test",
        [helper.make_tensor_value_info(n, onnx_type(a.dtype), None) for n, a in zip(names, arrays, strict=True)],
        [
            helper.make_tensor_value_info(n, onnx_type(a.dtype), None)
            for n, a in zip(outputs, closed.out_avals, strict=True)
        ],
        graph.initializers,
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, dict(zip(names, arrays, strict=True)))


def loop(x):
    def add(total, row):
        return total + row.sum(), (row * 2 + total, jnp.ones(3) * 1.0)

    return jax.lax.scan(add, jnp.zeros(()), x)


OPERATIONS = {
    "arithmetic": (lambda x: (x + 1) * 2 - x / 3 - jnp.maximum(x, 0.5) + jnp.minimum(x, -x) ** 2, (X,)),
    "functions": (lambda x: jnp.exp(x) + jnp.sin(x) * jnp.cos(x) + jnp.tanh(x) + jnp.log(jnp.abs(x)), (X,)),
    "roots": (lambda x: jax.lax.rsqrt(jnp.square(x) + 1) + jnp.sqrt(jnp.abs(x)) + jax.lax.integer_pow(x, 3), (X,)),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), (X,)),
    "sigmoid and relu": (lambda x: jax.nn.sigmoid(x) * jax.nn.relu(x), (X,)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=1), (X,)),
    "whole numbers": (lambda x: (x // 5, x % 5, jax.lax.rem(x, jnp.full_like(x, 5)), jnp.sign(x)), (WHOLE,)),
    "comparisons": (lambda x: (x > 0, x >= 0.5, x < 0, x <= 0, x == x, x != x[0, 0, 0], (x > 0) & ~(x < 1)), (X,)),
    "where": (lambda x: (jnp.where(x > 0, x, -1.0), jnp.where(x > 0, x > 1, x < -1), jnp.clip(x, -1, 1)), (X,)),
    "casts": (lambda x: (x.astype(jnp.int32), (x > 0).astype(jnp.float32), x.astype(bool)), (X,)),
    "shapes": (lambda x: (x.reshape(4, 24), x.transpose(2, 0, 1), x[:, None], x[:, :1].squeeze(1), x[..., ::-1]), (X,)),
    "slices": (lambda x: (x[:, 1:5:2], x[1], x[:, :, 3], x[:, 2:], jnp.split(x, [2, 3], axis=1)), (X,)),
    "joined": (
        lambda x: (jnp.concatenate([x, x[:, :2]], axis=1), jnp.stack([x, x + 1], axis=-1), jnp.repeat(x, 2, 1)),
        (X,),
    ),
    "padded": (
        lambda x: (
            jnp.pad(x, ((0, 0), (1, 2), (0, 3))),
            jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=-jnp.inf),
        ),
        (X,),
    ),
    "reduced": (
        lambda x: (x.sum((0, 2)), x.max(1), x.min(-1), jnp.any(x > 1, axis=1), jnp.all(x > -3, axis=(1, 2))),
        (X,),
    ),
    "orders": (lambda x: (jnp.argmax(x, axis=1), *jax.lax.top_k(x, 3), jnp.cumsum(x, axis=1)), (X,)),
    "counted": (
        lambda x: (jnp.arange(8)[None, None] * x, jax.lax.broadcasted_iota(jnp.int32, (2, 3), 0), jnp.zeros((2, 3))),
        (X,),
    ),
    "products": (
        lambda x: (
            x @ np.ones((8, 3), np.float32),
            jnp.einsum("bqd,bkd->bqk", x, x),
            jnp.einsum("bqd,kd->bqk", x, x[0]),
            jnp.einsum("bqd,bqd->bd", x, x),
            jnp.einsum("Ww,bwd->bWd", np.ones((4, 6), np.float32), x),
            jnp.einsum("bqd,qde->be", x, np.ones((6, 8, 2), np.float32)),
        ),
        (X,),
    ),
    "convolution": (
        lambda x: jax.lax.conv_general_dilated(
            x, KERNEL, (2, 2), ((1, 1), (1, 2)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (X.reshape(1, 6, 4, 4),),
    ),
    "depthwise": (
        lambda x: jax.lax.conv_general_dilated(
            x, KERNEL[:, :, :1, :4], (1, 1), "SAME", feature_group_count=4, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (X.reshape(1, 6, 4, 4),),
    ),
    "rows of each image": (lambda x, rows: jnp.take_along_axis(x, rows[..., None], axis=1), (X, ROWS)),
    "rows of all images": (lambda x: (x[:, np.int32([3, 0, 0])], x[:, :, np.int32([1, 7])]), (X,)),
    "rows that are looked up": (lambda x, rows: jax.vmap(lambda a, i: a[i])(x, rows), (X, ROWS)),
    "loop": (loop, (X[0],)),
    "blocks": (lambda x: chunked_attention(x, x, x), (X[0].repeat(1000, 0)[None, None][:, :, :300].repeat(8, 2),)),
    "pool": (lambda x: max_pool(x, portable=True), (X.reshape(1, 6, 8, 2),)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_onnxruntime_computes_what_jax_does(name):
    function, arrays = OPERATIONS[name]
    expected = jax.tree.leaves(jax.jit(function)(*arrays))
    found = run_as_onnx(function, *arrays)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_sizes_that_are_known_when_it_runs():
    def function(x):
        rows, columns = x.shape[:2]
        half = jax.lax.slice(x, (0, 0, 0), x.shape, (2, 1, 1))
        x = x.reshape(rows * columns, 8)
        return x + jnp.arange(rows * columns)[:, None], x[:, 1], half / rows, jnp.broadcast_to(x[:1], (columns, 8))

    for array in (X, X.transpose(1, 0, 2), X[:1]):
        expected = jax.jit(function)(array)
        for a, b in zip(run_as_onnx(function, array, symbols=("r", "c")), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_samples_of_maps_whose_sizes_are_known_when_it_runs():
    rng = np.random.default_rng(1)
    place, weight = rng.uniform(-2, 6, (1, 5, 2, 2, 3, 2)), rng.uniform(0, 1, (1, 5, 2, 2, 3))

    def function(fine):
        """Two levels, the second of rows twice as long."""
        height, width = fine.shape[:2]
        levels = [(height, width), (height, 2 * width)]
        maps = [fine, jnp.concatenate([fine, -fine], axis=1)]
        tokens = [cells.reshape(1, h * w, 2, 4) for cells, (h, w) in zip(maps, levels, strict=True)]
        places = (jnp.asarray(place, jnp.float32), jnp.asarray(weight, jnp.float32))
        return sample_cells(jnp.concatenate(tokens, axis=1), levels, *places, sampling=PORTABLE)

    for shape in ((4, 5, 8), (7, 3, 8)):
        array = rng.standard_normal(shape, np.float32)
        (found,) = run_as_onnx(function, array, symbols=("r", "c"))
        np.testing.assert_allclose(found, jax.jit(function)(array), atol=1e-5)


def test_an_operation_that_onnx_lacks_is_named():
    with pytest.raises(UserError, match="has the operation digamma, which cannot be written as ONNX"):
        run_as_onnx(lambda x: jax.scipy.special.digamma(x), X)

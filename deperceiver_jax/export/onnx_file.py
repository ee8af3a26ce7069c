"""ONNX files: written from a JAX program, and run by onnxruntime."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import onnx
from onnx import helper

from deperceiver_jax.export.onnx_graph import Graph, Value, full, onnx_type
from deperceiver_jax.export.onnx_lowering import lower
from deperceiver_jax.export.program import INPUTS, Answers, Sizes

OPSET = 18
IR_VERSION = 8  # that came with it: older runtimes refuse later ones


def write_onnx(path: Path, program: Callable[..., Answers], sizes: Sizes, metadata: Mapping[str, str]) -> None:
    """Writes `program` with the inputs INPUTS and the outputs of Answers. Raises UserError for what ONNX lacks."""
    closed, result = jax.make_jaxpr(program, return_shape=True)(*sizes.shapes())
    graph = Graph()
    arguments = [Value(name, tuple(v.aval.shape)) for name, v in zip(INPUTS, closed.jaxpr.invars, strict=True)]
    _find_symbols(graph, sizes)
    results = lower(graph, closed.jaxpr, closed.consts, arguments)
    for value, name, shape in zip(results, Answers._fields, result, strict=True):
        source = graph.name(full(graph, value, shape.shape))
        graph.nodes.append(helper.make_node("Identity", [source], [name], name=name))
    body = helper.make_graph(
        graph.nodes,
        "detector",
        [_described(name, v.aval) for name, v in zip(INPUTS, closed.jaxpr.invars, strict=True)],
        [_described(name, shape) for name, shape in zip(Answers._fields, result, strict=True)],
        graph.initializers,
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="deperceiver_jax"
    )
    helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    onnx.checker.check_model(str(path))


def _find_symbols(graph: Graph, sizes: Sizes) -> None:
    """The free sizes, from the shape of the pictures."""
    shape = graph.add("Shape", INPUTS[0])
    for axis, symbol in enumerate(("batch", "h", "w")):
        size = graph.add("Slice", shape, graph.integers(axis), graph.integers(axis + 1))
        graph.symbols[symbol] = graph.add("Div", size, graph.integers(sizes.multiple)) if axis else size


def _described(name: str, array) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else str(size) for size in array.shape]
    return helper.make_tensor_value_info(name, onnx_type(array.dtype), shape)


def open_onnx(path: Path) -> Callable[..., Answers]:
    """run(image, size, original_size), by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: np.ndarray) -> Answers:
        return Answers(*session.run(list(Answers._fields), dict(zip(INPUTS, inputs, strict=True))))

    return run

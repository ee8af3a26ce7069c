"""An ONNX graph while it is being written: its nodes, its constants, and sizes that are known when it runs."""

import ast
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGEST_KNOWN = 2**16  # elements that a result known now may have beyond its arguments; larger ones are computed later
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def onnx_type(dtype) -> int:
    return TYPES[np.dtype(dtype).name]


class Value(NamedTuple):
    """An array of the program: a NumPy array that is known now, or the name of what a node will compute.

    Its shape has 1 where the program's has more, and all that stands there is alike: operators of ONNX that work on
    elements repeat it by themselves.
    """

    what: Any
    shape: tuple[Any, ...]  # of numbers, and of symbols where sizes are free

    @property
    def is_known(self) -> bool:
        return not isinstance(self.what, str)


def known(array) -> Value:
    array = np.asarray(array)
    return Value(array, array.shape)


class Graph:
    """Nodes in the order in which they run. A method that adds one returns the name of its result.

    symbols: name of each free size -> the name of an int64 [1] that holds it.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.symbols: dict[str, str] = {}
        self._count = itertools.count()
        self._constants: dict[tuple, str] = {}
        self._sizes: dict[str, str] = {}

    def add(self, operator: str, *inputs: str, **attributes) -> str:
        return self.add_all(operator, inputs, 1, **attributes)[0]

    def add_all(self, operator: str, inputs: Sequence[str], num_outputs: int, **attributes) -> list[str]:
        outputs = [f"{operator.lower()}_{next(self._count)}" for _ in range(num_outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, array: np.ndarray) -> str:
        """Kept once for all who need the same."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            name = f"constant_{next(self._count)}"
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def name(self, value: Value) -> str:
        """Of the value as it is, be it known now or computed."""
        return self.constant(value.what) if value.is_known else value.what

    def integers(self, *numbers: int) -> str:
        return self.constant(np.asarray(numbers, np.int64))

    def sizes(self, shape: Sequence[Any]) -> str:
        """int64 [len(shape)]: numbers, or symbols that become numbers when the graph runs."""
        if not has_symbols(shape):
            return self.integers(*map(int, shape))
        return self.add("Concat", *map(self.size, shape), axis=0)

    def size(self, size: Any) -> str:
        """int64 [1]"""
        if not has_symbols([size]):
            return self.integers(int(size))
        text = str(size)
        if text not in self._sizes:
            self._sizes[text] = self._expression(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def _expression(self, node: ast.expr) -> str:
        """What JAX writes a symbol's arithmetic as: 4*h*w, floordiv(h + 1, 2)."""
        match node:
            case ast.Constant(int(number)):
                return self.integers(number)
            case ast.Name(symbol):
                return self.symbols[symbol]
            case ast.UnaryOp(ast.USub(), operand):
                return self.add("Neg", self._expression(operand))
            case ast.BinOp(left, ast.Pow(), ast.Constant(int(power))):
                return self.add("Pow", self._expression(left), self.integers(power))
            case ast.BinOp(left, operation, right) if type(operation) in _ARITHMETIC:
                return self.add(_ARITHMETIC[type(operation)], self._expression(left), self._expression(right))
            case ast.Call(ast.Name(function), arguments) if function in _FUNCTIONS:
                return self.add(_FUNCTIONS[function], *map(self._expression, arguments))
        raise NotImplementedError(f"a size of {ast.unparse(node)}")

    def cast(self, name: str, dtype) -> str:
        return self.add("Cast", name, to=onnx_type(dtype))


# Sizes are never negative, so that ONNX's division of integers, which cuts towards zero, is the one that rounds down.
_ARITHMETIC = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_FUNCTIONS = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}


def full(graph: Graph, value: Value, shape: tuple) -> Value:
    """The value with all its repetitions."""
    if len(value.shape) == len(shape) and all(map(same_size, value.shape, shape)):
        return value
    if value.is_known and not has_symbols(shape) and math.prod(shape) <= LARGEST_KNOWN:
        return known(np.broadcast_to(value.what, shape))
    return Value(graph.add("Expand", graph.name(value), graph.sizes(shape)), tuple(shape))


def reshape(graph: Graph, value: Value, shape: tuple) -> Value:
    """Of a value that has all its repetitions, or that stays alike along them."""
    if len(value.shape) == len(shape) and all(map(same_size, value.shape, shape)):
        return value
    if value.is_known and not has_symbols(shape):
        return known(value.what.reshape(shape))
    return Value(graph.add("Reshape", graph.name(value), graph.sizes(shape)), tuple(shape))


def ordered(graph: Graph, value: Value, order: list[int]) -> Value:
    order = [int(axis) for axis in order]
    if order == sorted(order):
        return value
    if value.is_known:
        return known(np.ascontiguousarray(value.what.transpose(order)))
    shape = tuple(value.shape[axis] for axis in order)
    return Value(graph.add("Transpose", graph.name(value), perm=order), shape)


def result_shape(*shapes: tuple) -> tuple:
    """Of an operator on elements: the sizes that are not 1."""
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    return tuple(next((size for size in column if not same_size(size, 1)), 1) for column in columns)


def has_symbols(shape: Sequence[Any]) -> bool:
    """Whether some size is known only when the graph runs."""
    return not all(isinstance(size, int | np.integer) for size in shape)


def same_size(a, b) -> bool:
    """Whether two sizes are the same number or the same symbol."""
    return str(a) == str(b)


def as_numpy(array) -> np.ndarray:
    return np.asarray(jnp.asarray(array))

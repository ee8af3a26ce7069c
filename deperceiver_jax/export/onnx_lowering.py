"""A JAX program as an ONNX graph, operation by operation: what is known now is computed now.

Source: the operators of ONNX's opset 18, and the primitives of jax.lax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from deperceiver_jax.errors import UserError
from deperceiver_jax.export.onnx_graph import (
    LARGEST_KNOWN,
    Graph,
    Value,
    as_numpy,
    full,
    has_symbols,
    known,
    reshape,
    result_shape,
)
from deperceiver_jax.export.onnx_rules import RULES

INLINED = {  # operations that run a program of their own: where it lies
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
RELU = (("custom_jvp_call", "relu"), ("custom_vjp_call", "_relu"))  # JAX's, and that of layers/activations.py
SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier")
ELEMENTWISE = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "pow": "Pow",
    "and": "And",
    "or": "Or",
    "not": "Not",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "neg": "Neg",
    "abs": "Abs",
    "sign": "Sign",
    "exp": "Exp",
    "log": "Log",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "erf": "Erf",
    "sqrt": "Sqrt",
    "floor": "Floor",
    "ceil": "Ceil",
    "logistic": "Sigmoid",
}


def lower(graph: Graph, jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """Writes a program into `graph` -> its results. Raises UserError for an operation that ONNX does not have."""
    values: dict[core.Var, Value] = dict(zip(jaxpr.constvars, map(known, constants), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: core.Var | core.Literal) -> Value:
        if not isinstance(atom, core.Literal):
            return values[atom]
        aval: Any = atom.aval
        return known(np.asarray(atom.val, aval.dtype))

    for equation in jaxpr.eqns:
        try:
            results = _lower_equation(graph, equation, [read(atom) for atom in equation.invars])
        except NotImplementedError as error:
            raise UserError(f"--format: this detector has {error}, which cannot be written as ONNX.") from error
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _lower_equation(graph: Graph, equation: Any, arguments: list[Value]) -> list[Value]:
    name, parameters = equation.primitive.name, equation.params
    if name in SAME:
        return arguments
    if name in INLINED:
        inner = parameters[INLINED[name]]
        whole = _whole_operation(graph, name, parameters, inner, arguments)
        if whole is not None:
            return whole
        jaxpr, constants = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        return lower(graph, jaxpr, constants, arguments)
    if name == "broadcast_in_dim":
        return [_broadcast(graph, equation, *arguments)]
    if name != "dim_as_value" and all(value.is_known for value in arguments):
        computed = _compute_now(equation, arguments)
        if computed is not None:
            return computed
    if name in ELEMENTWISE or name in _OF_ELEMENTS:
        return [_elementwise(graph, equation, arguments)]
    if name == "scan":
        return _scan(graph, equation, *_all_full(graph, equation, arguments))
    if name not in RULES:
        raise NotImplementedError(f"the operation {name}")
    results = RULES[name](graph, equation, *_all_full(graph, equation, arguments))
    return results if isinstance(results, list) else [results]


def _all_full(graph: Graph, equation, arguments: list[Value]) -> list[Value]:
    return [full(graph, value, atom.aval.shape) for value, atom in zip(arguments, equation.invars, strict=True)]


def _compute_now(equation, arguments: list[Value]) -> list[Value] | None:
    """The results where all arguments are known, unless they'd be much larger than these or have free sizes."""
    name = equation.primitive.name
    if any(has_symbols(variable.aval.shape) for variable in (*equation.invars, *equation.outvars)):
        return None
    arrays = [value.what for value in arguments]
    if name in ELEMENTWISE or name in _OF_ELEMENTS:
        rank = max((array.ndim for array in arrays), default=0)
        arrays = [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays]
        arrays = list(np.broadcast_arrays(*arrays))
    else:
        size = sum(math.prod(variable.aval.shape) for variable in equation.outvars)
        if size > LARGEST_KNOWN + sum(array.size for array in arrays):
            return None
        arrays = [np.broadcast_to(a, v.aval.shape) for a, v in zip(arrays, equation.invars, strict=True)]
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*arrays, **equation.params)
    return [known(as_numpy(x)) for x in (results if equation.primitive.multiple_results else [results])]


def _broadcast(graph: Graph, equation, value: Value, *sizes: Value) -> Value:
    """Only the place of the axes: what is repeated stays one, see Value."""
    del sizes  # of symbols; the shape has them too
    shape = [1] * len(equation.params["shape"])
    for axis, size in zip(equation.params["broadcast_dimensions"], value.shape, strict=True):
        shape[axis] = size
    return reshape(graph, value, tuple(shape))


def _elementwise(graph: Graph, equation, arguments: list[Value]) -> Value:
    name, names = equation.primitive.name, [graph.name(value) for value in arguments]
    shape = result_shape(*(value.shape for value in arguments))
    if name in ELEMENTWISE:
        return Value(graph.add(ELEMENTWISE[name], *names), shape)
    return Value(_OF_ELEMENTS[name](graph, equation, *names), shape)


def _integer_power(graph: Graph, equation, x: str) -> str:
    power = equation.params["y"]
    if power == 2:
        return graph.add("Mul", x, x)
    if power == -1:
        return graph.add("Reciprocal", x)
    return graph.add("Pow", x, graph.constant(np.asarray(power, equation.invars[0].aval.dtype)))


def _select(graph: Graph, equation, which: str, *cases: str) -> str:
    if len(cases) != 2 or equation.invars[0].aval.dtype != bool:
        raise NotImplementedError("a selection among more than two")
    if equation.outvars[0].aval.dtype != bool:
        return graph.add("Where", which, cases[1], cases[0])
    chosen = graph.add("And", which, cases[1]), graph.add("And", graph.add("Not", which), cases[0])
    return graph.add("Or", *chosen)


def _remainder(graph: Graph, equation, x: str, y: str) -> str:
    return graph.add("Mod", x, y, fmod=1)  # of the sign of x, as lax.rem


def _erfc(graph: Graph, equation, x: str) -> str:
    one = graph.constant(np.ones((), equation.invars[0].aval.dtype))
    return graph.add("Sub", one, graph.add("Erf", x))


_OF_ELEMENTS: dict[str, Callable[..., str]] = {
    "integer_pow": _integer_power,
    "select_n": _select,
    "rem": _remainder,
    "erfc": _erfc,
    "square": lambda graph, equation, x: graph.add("Mul", x, x),
    "rsqrt": lambda graph, equation, x: graph.add("Reciprocal", graph.add("Sqrt", x)),
    "ne": lambda graph, equation, x, y: graph.add("Not", graph.add("Equal", x, y)),
    "clamp": lambda graph, equation, low, x, high: graph.add("Min", graph.add("Max", x, low), high),
    "convert_element_type": lambda graph, equation, x: graph.cast(x, equation.params["new_dtype"]),
}


def _scan(graph: Graph, equation, *arguments: Value) -> list[Value]:
    """Round after round: ONNX's loops run slowly and are not optimised."""
    parameters, inner = equation.params, equation.params["jaxpr"]
    # By their ranks, since versions of JAX name the numbers differently: what is read or stacked round by round has an
    # axis more outside.
    rows_in = [len(x.aval.shape) > len(y.shape) for x, y in zip(equation.invars, inner.in_avals, strict=True)]
    rows_out = [
        len(x.aval.shape) > len(array.shape) for x, array in zip(equation.outvars, inner.out_avals, strict=True)
    ]
    num_carried = rows_out.count(False)
    num_constants = rows_in.count(False) - num_carried
    constants = arguments[:num_constants]
    carried = list(arguments[num_constants : num_constants + num_carried])
    rows = arguments[num_constants + num_carried :]
    rounds = range(parameters["length"])
    results = []
    for i in reversed(rounds) if parameters["reverse"] else rounds:
        now = [_row(graph, value, i) for value in rows]
        outputs = lower(graph, inner.jaxpr, inner.consts, [*constants, *carried, *now])
        shapes = [array.shape for array in inner.out_avals]
        outputs = [full(graph, value, shape) for value, shape in zip(outputs, shapes, strict=True)]
        carried = outputs[:num_carried]
        results.append(outputs[num_carried:])
    if parameters["reverse"]:
        results.reverse()
    stacked = []
    for parts, variable in zip(zip(*results, strict=True), equation.outvars[num_carried:], strict=True):
        names = [graph.add("Unsqueeze", graph.name(part), graph.integers(0)) for part in parts]
        stacked.append(Value(graph.add("Concat", *names, axis=0), tuple(variable.aval.shape)))
    return carried + stacked


def _row(graph: Graph, value: Value, i: int) -> Value:
    if value.is_known:
        return known(value.what[i])
    name = graph.add("Gather", graph.name(value), graph.constant(np.asarray(i, np.int64)), axis=0)
    return Value(name, value.shape[1:])


def _whole_operation(graph: Graph, name: str, parameters, inner, arguments: list[Value]) -> list[Value] | None:
    """Programs that are one operator of ONNX, by their names; None for all others."""
    jaxpr = inner.jaxpr if hasattr(inner, "consts") else inner
    if (name, jaxpr.debug_info.func_name) in RELU and not arguments[0].is_known:
        return [Value(graph.add("Relu", graph.name(arguments[0])), arguments[0].shape)]
    return None

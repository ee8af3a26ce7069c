"""JAX's operations as ONNX's: one rule for each primitive that a portable detector (models/layers/compute.py) has.

Source: the operators of ONNX's opset 18, and the primitives of jax.lax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from deperceiver_jax.errors import UserError
from deperceiver_jax.export.onnx_graph import Graph, Value, as_numpy, has_symbols, known, result_shape, same_size

LARGEST_KNOWN = 2**16  # elements that a result known now may have beyond its arguments; larger ones are computed later

Rule = Callable[..., "Value | list[Value]"]
RULES: dict[str, Rule] = {}
INLINED = {  # operations that run a program of their own: where it lies
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
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
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


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
        results = _lower_equation(graph, equation, [read(atom) for atom in equation.invars])
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
    if name not in RULES:
        raise UserError(f"--format: this detector has the operation {name}, which cannot be written as ONNX.")
    whole = [full(graph, value, atom.aval.shape) for value, atom in zip(arguments, equation.invars, strict=True)]
    results = RULES[name](graph, equation, *whole)
    return results if isinstance(results, list) else [results]


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


def full(graph: Graph, value: Value, shape: tuple) -> Value:
    """The value with all its repetitions."""
    if len(value.shape) == len(shape) and all(map(same_size, value.shape, shape)):
        return value
    if value.is_known and not has_symbols(shape) and math.prod(shape) <= LARGEST_KNOWN:
        return known(np.broadcast_to(value.what, shape))
    return Value(graph.add("Expand", graph.name(value), graph.sizes(shape)), tuple(shape))


def _reshape(graph: Graph, value: Value, shape: tuple) -> Value:
    """Of a value that has all its repetitions, or that stays alike along them."""
    if len(value.shape) == len(shape) and all(map(same_size, value.shape, shape)):
        return value
    if value.is_known and not has_symbols(shape):
        return known(value.what.reshape(shape))
    return Value(graph.add("Reshape", graph.name(value), graph.sizes(shape)), tuple(shape))


def _broadcast(graph: Graph, equation, value: Value, *sizes: Value) -> Value:
    """Only the place of the axes: what is repeated stays one, see Value."""
    del sizes  # of symbols; the shape has them too
    shape = [1] * len(equation.params["shape"])
    for axis, size in zip(equation.params["broadcast_dimensions"], value.shape, strict=True):
        shape[axis] = size
    return _reshape(graph, value, tuple(shape))


# --- element by element ---------------------------------------------------------------------------------------------


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


# --- shapes ---------------------------------------------------------------------------------------------------------


def rule(name: str):
    def keep(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return keep


def _shape(equation) -> tuple:
    return tuple(equation.outvars[0].aval.shape)


@rule("reshape")
@rule("squeeze")
@rule("expand_dims")
def _reshaped(graph: Graph, equation, x: Value, *sizes: Value) -> Value:
    return _reshape(graph, x, _shape(equation))


@rule("transpose")
def _transpose(graph: Graph, equation, x: Value) -> Value:
    order = [int(axis) for axis in equation.params["permutation"]]
    return Value(graph.add("Transpose", graph.name(x), perm=order), _shape(equation))


@rule("slice")
def _slice(graph: Graph, equation, x: Value) -> Value:
    parameters, shape = equation.params, x.shape
    strides = parameters["strides"] or (1,) * len(shape)
    starts, ends = parameters["start_indices"], parameters["limit_indices"]
    axes = [
        axis
        for axis in range(len(shape))
        if strides[axis] != 1 or not (same_size(starts[axis], 0) and same_size(ends[axis], shape[axis]))
    ]
    if not axes:
        return x
    bounds = (graph.sizes([of[axis] for axis in axes]) for of in (starts, ends))
    steps = graph.integers(*(strides[axis] for axis in axes))
    return Value(graph.add("Slice", graph.name(x), *bounds, graph.integers(*axes), steps), _shape(equation))


@rule("rev")
def _reverse(graph: Graph, equation, x: Value) -> Value:
    axes = [int(axis) for axis in equation.params["dimensions"]]
    bounds = ([-1] * len(axes), [-(2**31)] * len(axes), axes, [-1] * len(axes))
    return Value(graph.add("Slice", graph.name(x), *(graph.integers(*b) for b in bounds)), _shape(equation))


@rule("split")
def _split(graph: Graph, equation, x: Value) -> list[Value]:
    sizes = graph.sizes(equation.params["sizes"])
    names = graph.add_all("Split", [graph.name(x), sizes], len(equation.outvars), axis=int(equation.params["axis"]))
    return [Value(name, tuple(v.aval.shape)) for name, v in zip(names, equation.outvars, strict=True)]


@rule("concatenate")
def _concatenate(graph: Graph, equation, *parts: Value) -> Value:
    axis = int(equation.params["dimension"])
    return Value(graph.add("Concat", *map(graph.name, parts), axis=axis), _shape(equation))


@rule("stack")
def _stack(graph: Graph, equation, *parts: Value) -> Value:
    axis = int(equation.params["axis"])
    names = [graph.add("Unsqueeze", graph.name(part), graph.integers(axis)) for part in parts]
    return Value(graph.add("Concat", *names, axis=axis), _shape(equation))


@rule("pad")
def _pad(graph: Graph, equation, x: Value, padding: Value) -> Value:
    config = equation.params["padding_config"]
    if any(inner for _, _, inner in config) or any(isinstance(e, int) and e < 0 for row in config for e in row):
        raise NotImplementedError("padding between elements, or less than none")
    edges = graph.sizes([low for low, _, _ in config] + [high for _, high, _ in config])
    return Value(graph.add("Pad", graph.name(x), edges, graph.name(padding)), _shape(equation))


@rule("iota")
def _iota(graph: Graph, equation, *sizes: Value) -> Value:
    """Along its axis alone, see Value."""
    shape, axis = _shape(equation), equation.params["dimension"]
    scalar = graph.add("Squeeze", graph.size(shape[axis]), graph.integers(0))
    zero, one = (graph.constant(np.asarray(number, np.int64)) for number in (0, 1))
    counted = graph.cast(graph.add("Range", zero, scalar, one), equation.params["dtype"])
    along = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    return _reshape(graph, Value(counted, (shape[axis],)), along)


@rule("dim_as_value")
def _size_as_value(graph: Graph, equation) -> Value:
    scalar = graph.add("Squeeze", graph.size(equation.params["dim"]), graph.integers(0))
    return Value(graph.cast(scalar, equation.outvars[0].aval.dtype), ())


# --- sums, orders, products -----------------------------------------------------------------------------------------


def _reduce(graph: Graph, equation, x: Value) -> Value:
    axes = graph.integers(*(int(axis) for axis in equation.params["axes"]))
    operator = REDUCTIONS[equation.primitive.name]
    return Value(graph.add(operator, graph.name(x), axes, keepdims=0), _shape(equation))


def _reduce_bool(graph: Graph, equation, x: Value) -> Value:
    axes = graph.integers(*(int(axis) for axis in equation.params["axes"]))
    operator = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}[equation.primitive.name]
    numbers = graph.cast(graph.name(x), np.int32)
    return Value(graph.cast(graph.add(operator, numbers, axes, keepdims=0), bool), _shape(equation))


RULES |= dict.fromkeys(REDUCTIONS, _reduce) | dict.fromkeys(("reduce_or", "reduce_and"), _reduce_bool)


@rule("argmax")
def _argmax(graph: Graph, equation, x: Value) -> Value:
    (axis,) = equation.params["axes"]
    found = graph.add("ArgMax", graph.name(x), axis=int(axis), keepdims=0)
    return Value(graph.cast(found, equation.params["index_dtype"]), _shape(equation))


@rule("cumsum")
def _running_sum(graph: Graph, equation, x: Value) -> Value:
    axis = graph.constant(np.asarray(equation.params["axis"], np.int64))
    reverse = int(equation.params["reverse"])
    return Value(graph.add("CumSum", graph.name(x), axis, reverse=reverse), _shape(equation))


@rule("top_k")
def _top_k(graph: Graph, equation, x: Value) -> list[Value]:
    k, axis = graph.integers(equation.params["k"]), equation.params.get("axis", -1)
    values, indices = graph.add_all("TopK", [graph.name(x), k], 2, axis=int(axis))
    shape = _shape(equation)
    return [Value(values, shape), Value(graph.cast(indices, equation.outvars[1].aval.dtype), shape)]


@rule("dot_general")
def _product(graph: Graph, equation, left: Value, right: Value) -> Value:
    """MatMul, with axes in the order [batch, free, contracted] x [batch, contracted, free]."""
    (left_summed, right_summed), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_summed, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_summed, *right_batch)]
    batch = tuple(left.shape[axis] for axis in left_batch)
    # MatMul itself repeats a matrix along any free axes of the other factor.
    plain = not batch and len(right_summed) == len(right_free) == 1
    merged_left = (*batch, *(left.shape[a] for a in left_free)) if plain else (*batch, _product_of(left, left_free))
    left = _ordered(graph, left, [*left_batch, *left_free, *left_summed])
    left = _reshape(graph, left, (*merged_left, _product_of(left, range(len(left.shape))[-len(left_summed) :])))
    right = _ordered(graph, right, [*right_batch, *right_summed, *right_free])
    summed, free = range(len(batch), len(batch) + len(right_summed)), range(len(batch) + len(right_summed), 99)
    free = [axis for axis in free if axis < len(right.shape)]
    right = _reshape(graph, right, (*batch, _product_of(right, summed), _product_of(right, free)))
    shape = (*merged_left, right.shape[-1])
    return _reshape(graph, Value(graph.add("MatMul", graph.name(left), graph.name(right)), shape), _shape(equation))


def _product_of(value: Value, axes) -> Any:
    return math.prod(value.shape[axis] for axis in axes)


def _ordered(graph: Graph, value: Value, order: list[int]) -> Value:
    order = [int(axis) for axis in order]
    if order == sorted(order):
        return value
    if value.is_known:
        return known(np.ascontiguousarray(value.what.transpose(order)))
    shape = tuple(value.shape[axis] for axis in order)
    return Value(graph.add("Transpose", graph.name(value), perm=order), shape)


@rule("conv_general_dilated")
def _convolution(graph: Graph, equation, x: Value, kernel: Value) -> Value:
    parameters = equation.params
    if any(n != 1 for n in (*parameters["lhs_dilation"], parameters["batch_group_count"])):
        raise NotImplementedError("a convolution with holes in its input")
    of_x, of_kernel, of_result = parameters["dimension_numbers"]
    edges = [int(low) for low, _ in parameters["padding"]] + [int(high) for _, high in parameters["padding"]]
    convolved = graph.add(
        "Conv",
        graph.name(_ordered(graph, x, list(of_x))),
        graph.name(_ordered(graph, kernel, list(of_kernel))),
        pads=edges,
        strides=list(parameters["window_strides"]),
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
    )
    shape = _shape(equation)
    back = Value(convolved, tuple(shape[axis] for axis in of_result))
    return _ordered(graph, back, [of_result.index(axis) for axis in range(len(shape))])


@rule("gather")
def _gather(graph: Graph, equation, x: Value, indices: Value) -> Value:
    """Whole slices along one axis: those of all images at the same places, or of each image at its own."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    batching = tuple(numbers.operand_batching_dims)
    if len(indices.shape) == 1:
        return _window(graph, equation, x, indices)
    (axis,) = numbers.start_index_map
    taken = {*batching, *numbers.collapsed_slice_dims}
    whole = all(same_size(sizes[a], x.shape[a]) for a in range(len(x.shape)) if a not in taken)
    if tuple(numbers.collapsed_slice_dims) != (axis,) or not whole or not same_size(indices.shape[-1], 1):
        raise NotImplementedError(f"a gather of {x.shape} at {indices.shape} with {numbers} and {sizes}")
    places = _reshape(graph, indices, indices.shape[:-1])
    if not batching:
        # Offset axes may stand before the places, where Gather puts them only if the axis lies there.
        taken_first = graph.add("Gather", graph.name(x), graph.name(places), axis=int(axis))
        order = _places_of_axes(int(axis), len(places.shape), len(x.shape), numbers.offset_dims)
        shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
        return _ordered(graph, Value(taken_first, shape), order)
    if batching != (0,) or tuple(numbers.start_indices_batching_dims) != (0,) or int(axis) != 1:
        raise NotImplementedError("a gather of each image along another axis than its first")
    offsets = range(len(places.shape), len(places.shape) + len(x.shape) - 2)
    if tuple(map(int, numbers.offset_dims)) != tuple(offsets):
        raise NotImplementedError("a gather whose slices do not come last")
    wide = graph.cast(graph.name(indices), np.int64)
    return Value(graph.add("GatherND", graph.name(x), wide, batch_dims=1), _shape(equation))


def _window(graph: Graph, equation, x: Value, start: Value) -> Value:
    """One window at one place: how JAX indexes arrays of free sizes."""
    axes = [int(axis) for axis in equation.params["dimension_numbers"].start_index_map]
    sizes = equation.params["slice_sizes"]
    starts = graph.cast(graph.name(start), np.int64)
    ends = graph.add("Add", starts, graph.sizes([sizes[axis] for axis in axes]))
    window = graph.add("Slice", graph.name(x), starts, ends, graph.integers(*axes))
    return _reshape(graph, Value(window, tuple(sizes)), _shape(equation))


def _places_of_axes(axis: int, num_places: int, rank: int, offset_dims) -> list[int]:
    """Order of Gather's axes (before, places, after) that puts the offsets at `offset_dims`."""
    offsets = [*range(axis), *range(axis + num_places, rank - 1 + num_places)]
    places = iter(range(axis, axis + num_places))
    at = dict(zip((int(d) for d in offset_dims), offsets, strict=True))
    return [at[i] if i in at else next(places) for i in range(rank - 1 + num_places)]


@rule("scan")
def _scan(graph: Graph, equation, *arguments: Value) -> list[Value]:
    """Round after round: ONNX's loops run slowly and are not optimised."""
    parameters = equation.params
    num_constants, num_carried, inner = parameters["num_consts"], parameters["num_carry"], parameters["jaxpr"]
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


# --- operations that ONNX has whole ---------------------------------------------------------------------------------


def _whole_operation(graph: Graph, name: str, parameters, inner, arguments: list[Value]) -> list[Value] | None:
    """Programs that are one operator of ONNX, by their names; None for all others."""
    jaxpr = inner.jaxpr if hasattr(inner, "consts") else inner
    if name == "custom_jvp_call" and jaxpr.debug_info.func_name == "relu" and not arguments[0].is_known:
        return [Value(graph.add("Relu", graph.name(arguments[0])), arguments[0].shape)]
    return None

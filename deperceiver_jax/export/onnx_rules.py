"""JAX's operations on whole arrays as ONNX's: one rule for each primitive that a portable detector has.

A rule is called as rule(graph, equation, *values), with values that have all their repetitions, and returns the result
or a list of results. Source: the operators of ONNX's opset 18, and the primitives of jax.lax.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deperceiver_jax.export.onnx_graph import Graph, Value, ordered, reshape, same_size

Rule = Callable[..., "Value | list[Value]"]
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def _shape(equation) -> tuple:
    return tuple(equation.outvars[0].aval.shape)


def _reshaped(graph: Graph, equation, x: Value, *sizes: Value) -> Value:
    return reshape(graph, x, _shape(equation))


def _transpose(graph: Graph, equation, x: Value) -> Value:
    order = [int(axis) for axis in equation.params["permutation"]]
    return Value(graph.add("Transpose", graph.name(x), perm=order), _shape(equation))


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


def _reverse(graph: Graph, equation, x: Value) -> Value:
    axes = [int(axis) for axis in equation.params["dimensions"]]
    bounds = ([-1] * len(axes), [-(2**31)] * len(axes), axes, [-1] * len(axes))
    return Value(graph.add("Slice", graph.name(x), *(graph.integers(*b) for b in bounds)), _shape(equation))


def _split(graph: Graph, equation, x: Value) -> list[Value]:
    sizes = graph.sizes(equation.params["sizes"])
    names = graph.add_all("Split", [graph.name(x), sizes], len(equation.outvars), axis=int(equation.params["axis"]))
    return [Value(name, tuple(v.aval.shape)) for name, v in zip(names, equation.outvars, strict=True)]


def _concatenate(graph: Graph, equation, *parts: Value) -> Value:
    axis = int(equation.params["dimension"])
    return Value(graph.add("Concat", *map(graph.name, parts), axis=axis), _shape(equation))


def _stack(graph: Graph, equation, *parts: Value) -> Value:
    axis = int(equation.params["axis"])
    names = [graph.add("Unsqueeze", graph.name(part), graph.integers(axis)) for part in parts]
    return Value(graph.add("Concat", *names, axis=axis), _shape(equation))


def _pad(graph: Graph, equation, x: Value, padding: Value) -> Value:
    config = equation.params["padding_config"]
    if any(inner for _, _, inner in config) or any(isinstance(e, int) and e < 0 for row in config for e in row):
        raise NotImplementedError("padding between elements, or less than none")
    edges = graph.sizes([low for low, _, _ in config] + [high for _, high, _ in config])
    return Value(graph.add("Pad", graph.name(x), edges, graph.name(padding)), _shape(equation))


def _iota(graph: Graph, equation, *sizes: Value) -> Value:
    """Along its axis alone, see Value."""
    shape, axis = _shape(equation), equation.params["dimension"]
    scalar = graph.add("Squeeze", graph.size(shape[axis]), graph.integers(0))
    zero, one = (graph.constant(np.asarray(number, np.int64)) for number in (0, 1))
    counted = graph.cast(graph.add("Range", zero, scalar, one), equation.params["dtype"])
    along = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    return reshape(graph, Value(counted, (shape[axis],)), along)


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


def _argmax(graph: Graph, equation, x: Value) -> Value:
    (axis,) = equation.params["axes"]
    found = graph.add("ArgMax", graph.name(x), axis=int(axis), keepdims=0)
    return Value(graph.cast(found, equation.params["index_dtype"]), _shape(equation))


def _running_sum(graph: Graph, equation, x: Value) -> Value:
    axis = graph.constant(np.asarray(equation.params["axis"], np.int64))
    reverse = int(equation.params["reverse"])
    return Value(graph.add("CumSum", graph.name(x), axis, reverse=reverse), _shape(equation))


def _top_k(graph: Graph, equation, x: Value) -> list[Value]:
    k, axis = graph.integers(equation.params["k"]), equation.params.get("axis", -1)
    values, indices = graph.add_all("TopK", [graph.name(x), k], 2, axis=int(axis))
    shape = _shape(equation)
    return [Value(values, shape), Value(graph.cast(indices, equation.outvars[1].aval.dtype), shape)]


def _product(graph: Graph, equation, left: Value, right: Value) -> Value:
    """MatMul, with axes in the order [batch, free, contracted] x [batch, contracted, free]."""
    (left_summed, right_summed), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_summed, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_summed, *right_batch)]
    batch = tuple(left.shape[axis] for axis in left_batch)
    # MatMul itself repeats a matrix along any free axes of the other factor.
    plain = not batch and len(right_summed) == len(right_free) == 1
    merged_left = (*batch, *(left.shape[a] for a in left_free)) if plain else (*batch, _product_of(left, left_free))
    left = ordered(graph, left, [*left_batch, *left_free, *left_summed])
    left = reshape(graph, left, (*merged_left, _product_of(left, range(len(left.shape))[-len(left_summed) :])))
    right = ordered(graph, right, [*right_batch, *right_summed, *right_free])
    summed, free = range(len(batch), len(batch) + len(right_summed)), range(len(batch) + len(right_summed), 99)
    free = [axis for axis in free if axis < len(right.shape)]
    right = reshape(graph, right, (*batch, _product_of(right, summed), _product_of(right, free)))
    shape = (*merged_left, right.shape[-1])
    return reshape(graph, Value(graph.add("MatMul", graph.name(left), graph.name(right)), shape), _shape(equation))


def _product_of(value: Value, axes) -> Any:
    return math.prod(value.shape[axis] for axis in axes)


def _convolution(graph: Graph, equation, x: Value, kernel: Value) -> Value:
    parameters = equation.params
    if any(n != 1 for n in (*parameters["lhs_dilation"], parameters["batch_group_count"])):
        raise NotImplementedError("a convolution with holes in its input")
    of_x, of_kernel, of_result = parameters["dimension_numbers"]
    edges = [int(low) for low, _ in parameters["padding"]] + [int(high) for _, high in parameters["padding"]]
    convolved = graph.add(
        "Conv",
        graph.name(ordered(graph, x, list(of_x))),
        graph.name(ordered(graph, kernel, list(of_kernel))),
        pads=edges,
        strides=list(parameters["window_strides"]),
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
    )
    shape = _shape(equation)
    back = Value(convolved, tuple(shape[axis] for axis in of_result))
    return ordered(graph, back, [of_result.index(axis) for axis in range(len(shape))])


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
    places = reshape(graph, indices, indices.shape[:-1])
    if not batching:
        # Offset axes may stand before the places, where Gather puts them only if the axis lies there.
        taken_first = graph.add("Gather", graph.name(x), graph.name(places), axis=int(axis))
        order = _places_of_axes(int(axis), len(places.shape), len(x.shape), numbers.offset_dims)
        shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
        return ordered(graph, Value(taken_first, shape), order)
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
    return reshape(graph, Value(window, tuple(sizes)), _shape(equation))


def _places_of_axes(axis: int, num_places: int, rank: int, offset_dims) -> list[int]:
    """Order of Gather's axes (before, places, after) that puts the offsets at `offset_dims`."""
    offsets = [*range(axis), *range(axis + num_places, rank - 1 + num_places)]
    places = iter(range(axis, axis + num_places))
    at = dict(zip((int(d) for d in offset_dims), offsets, strict=True))
    return [at[i] if i in at else next(places) for i in range(rank - 1 + num_places)]


RULES: dict[str, Rule] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _reverse,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "iota": _iota,
    "dim_as_value": _size_as_value,
    "argmax": _argmax,
    "cumsum": _running_sum,
    "top_k": _top_k,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    **dict.fromkeys(REDUCTIONS, _reduce),
    "reduce_or": _reduce_bool,
    "reduce_and": _reduce_bool,
}

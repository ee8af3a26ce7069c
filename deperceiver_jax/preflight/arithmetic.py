"""Floating point operations of a traced program: its matrix products and convolutions, as often as they run.

Counted before compilation, because a TPU's compiler writes products as convolutions with holes and as kernels that do
not say what they compute. What is computed again in the backward pass counts again.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, platform: str) -> int:
    """2 x multiplications of a program for `platform`, over all devices."""
    return count(jaxpr, platform, _flops)


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr, platform: str, figure: Callable[[core.JaxprEqn], int]) -> int:
    """The sum of a figure of every product, convolution and kernel, as often as it runs; in a while loop, once.

    What no result depends on is left out, as compilers do.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr, platform, figure)


def _count(
    jaxpr: core.ClosedJaxpr | core.Jaxpr,
    platform: str,
    figure: Callable[[core.JaxprEqn], int],
    given: Sequence[int | None] = (),
) -> int:
    """given: of each input the branch that it says is taken on this platform, where it is known to say one."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    chosen = dict(zip(jaxpr.invars, given, strict=True)) if given else {}
    used = {operand for equation in jaxpr.eqns for operand in equation.invars if isinstance(operand, core.Var)}
    used.update(result for result in jaxpr.outvars if isinstance(result, core.Var))
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "pallas_call" and used.isdisjoint(equation.outvars):  # compilers leave it out, JAX does not
            continue
        if name == "platform_index":
            chosen[equation.outvars[0]] = _branch(parameters["platforms"], platform)
        elif name in ("dot_general", "conv_general_dilated", "pallas_call"):
            total += figure(equation)
        elif name == "cond":
            branches = parameters["branches"]
            index = equation.invars[0]
            taken = chosen.get(index) if isinstance(index, core.Var) else int(index.val)
            counts = [_count(b, platform, figure) for b in (branches if taken is None else [branches[taken]])]
            total += max(counts)
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":
                times = parameters["mesh"].size
            known = [chosen.get(operand) if isinstance(operand, core.Var) else None for operand in equation.invars]
            for inner in _inside(parameters):
                same = len((inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner).invars) == len(known)
                total += times * _count(inner, platform, figure, known if same else ())
    return total


def _inside(parameters) -> list:
    """The programs that an operation runs."""
    found = []
    for name, value in parameters.items():
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr) and not name.startswith(("fwd", "bwd", "cond")):
            found.append(value)
    return found


def _branch(platforms, platform: str) -> int:
    """The branch of `jax.lax.platform_dependent` that a platform takes; None in the list is the default."""
    names = {"gpu": ("cuda", "gpu"), "cuda": ("cuda", "gpu")}.get(platform, (platform,))
    default = len(platforms)
    for index, each in enumerate(platforms):
        if each is None:
            default = index
        elif set(each) & set(names):
            return index
    return default


def _flops(equation: core.JaxprEqn) -> int:
    if equation.primitive.name == "pallas_call":
        estimate = equation.params["cost_estimate"]
        return 0 if estimate is None else int(estimate.flops)
    return _product(equation) if equation.primitive.name == "dot_general" else _convolution(equation)


def _product(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation) -> int:
    """Products with padding and with the holes of dilated inputs are not counted."""
    parameters = equation.params
    left, right = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    of_left, of_right, of_out = parameters["dimension_numbers"]
    pairs = 1
    for axis in range(len(out) - 2):
        pairs *= _valid_pairs(
            left[of_left[2 + axis]],
            right[of_right[2 + axis]],
            out[of_out[2 + axis]],
            parameters["window_strides"][axis],
            parameters["padding"][axis][0],
            parameters["lhs_dilation"][axis],
            parameters["rhs_dilation"][axis],
        )
    return 2 * out[of_out[0]] * out[of_out[1]] * right[of_right[1]] * pairs


@functools.cache
def _valid_pairs(size, kernel, out, stride, padding, size_dilation, kernel_dilation) -> int:
    """How many pairs of an output place and a kernel place meet a place of the input."""
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - padding
    inside = (places >= 0) & (places <= (size - 1) * size_dilation) & (places % size_dilation == 0)
    return int(inside.sum())

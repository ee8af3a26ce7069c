"""How many operations a program's matrix products and convolutions need, counted in its jaxpr.

XLA's own count (`cost_analysis`) takes the body of a loop once, however often it runs, and our layers are loops. Here a
scan counts as often as it runs. Of the branches of a `cond` the cheapest counts, of a `while` one round: what the model
needs, not what a platform's way of computing it takes. A checkpointed part counts as often as it is computed, so count
the program without them. Everything else (norms, softmax, losses, the optimiser) is left out, as MFU has it.
"""

import math
from collections.abc import Iterator

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """Multiplications and additions of all matrix products and convolutions; their padding counts, dilation not."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _), left = params["dimension_numbers"], equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        products = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Dilating the input, as the gradient of a strided convolution does, puts zeros between its values.
        return 2 * equation.outvars[0].aval.size * products // math.prod(params["lhs_dilation"])
    if name == "pallas_call":
        raise ValueError("matmul_flops cannot look into a kernel; count the program with config.attention = 'xla'.")
    inner = [matmul_flops(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return min(inner)
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "shard_map":  # its program is that of one device
        return sum(inner) * params["mesh"].size
    return sum(inner)


def _jaxprs(params: dict) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    """Those that an equation runs."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (core.Jaxpr, core.ClosedJaxpr)):
                yield each

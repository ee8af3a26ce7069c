"""A module as something that holds arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx


def over_arrays(function: Callable, *modules: nnx.Module) -> Any:
    """A module like the first, with `function` of the arrays of all `modules` in the place of each of its arrays."""
    return nnx.merge(nnx.graphdef(modules[0]), jax.tree.map(function, *map(nnx.state, modules)))


def shape_of(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    """And its type."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)

"""A whole module's parameters from and to an official state dict, as a run's are from and to a file."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deperceiver_jax.weights.name_rules import LoadReport, NameRules, from_torch, to_torch, with_copies


def load_torch_state(
    module: nnx.Module, state: Mapping[str, np.ndarray], rules: NameRules, *, source: str | Path = "the state dict"
) -> LoadReport:
    """Puts a whole state dict into `module`, in the types of its parameters; a UserError leaves it as it was."""
    variables = _variables(module)
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    arrays, report = from_torch(state, shapes, rules, source=source)
    for path, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[path], variable.get_value().dtype))
    return report


def to_torch_state(module: nnx.Module, rules: NameRules) -> dict[str, np.ndarray]:
    """The official state dict of `module`, copies and all: what `load_torch_state` would load to get it."""
    arrays = {path: np.asarray(variable.get_value()) for path, variable in _variables(module).items()}
    return with_copies(to_torch(arrays, rules), rules)


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): v for path, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)}

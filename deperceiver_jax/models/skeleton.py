"""A detector in two parts: its structure, and its arrays by "/"-joined path."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.typing import PathParts

from deperceiver_jax.structures import Array


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A detector without its arrays. Hashable, so a jitted function can close over it."""

    graphdef: nnx.GraphDef
    paths: tuple[PathParts, ...]

    def merge(self, arrays: Mapping[str, Array]) -> Any:
        """The detector that computes with `arrays`, which must be all of its arrays and no other."""
        return nnx.merge(self.graphdef, nnx.from_flat_state([(path, arrays[join(path)]) for path in self.paths]))


def join(path: PathParts) -> str:
    """("decoder", "layers", 0, "kernel") -> "decoder/layers/0/kernel"."""
    return "/".join(map(str, path))


def take_apart(detector: nnx.Module) -> tuple[Skeleton, dict[str, Array], dict[str, Array]]:
    """A detector, real or abstract -> (skeleton, its `nnx.Param` arrays, all its other arrays)."""
    graphdef, state = nnx.split(detector)
    params: dict[str, Array] = {}
    others: dict[str, Array] = {}
    for path, variable in nnx.to_flat_state(state):
        (params if isinstance(variable, nnx.Param) else others)[join(path)] = variable.get_value()
    return Skeleton(graphdef, tuple(path for path, _ in nnx.to_flat_state(state))), params, others

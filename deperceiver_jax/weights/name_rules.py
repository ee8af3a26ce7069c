"""Which official name is which of our parameters, and how their layouts differ. tables/ has one table per family.

Ours are paths like `encoder/blocks/layers/mlp/layers/0/kernel`, whose repeated layers share one array with a leading
layer axis; theirs are PyTorch's, one array a layer. A table is used in both directions and never partly: a parameter
without a name and a name without a parameter are errors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.skeleton import take_apart


class Layout(NamedTuple):
    """How an array of theirs becomes one of ours, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(lambda a: a.T, lambda a: a.T)  # [out, in] <-> [in, out]
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Layout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])  # 1x1 convolution <-> linear layer
ROW = Layout(lambda a: a[0], lambda a: a[None])  # a table of one row <-> a vector


class Rule(NamedTuple):
    """One line of a table: our path (a regular expression), their name, and how the arrays differ.

    The name may use the expression's groups (\\1). With `first_layer` our array is a stack of theirs: {layer} in the
    name counts from it (a name without {layer} belongs to a stack of one). With `third` ours is that third of theirs
    along its first axis: PyTorch's attention keeps query, key and value (0, 1, 2) in one array.
    """

    path: str
    name: str
    layout: Layout = SAME
    first_layer: int | None = None
    third: int | None = None

    def shape_of_theirs(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under one official name of our array of this shape."""
        layer = ours if self.first_layer is None else ours[1:]
        first, *rest = self.layout.to_theirs(np.broadcast_to(np.float32(0), layer)).shape
        return (first if self.third is None else 3 * first, *rest)

    def from_theirs(self, theirs: np.ndarray) -> np.ndarray:
        """Our array, or our layer of it."""
        return self.layout.to_ours(theirs if self.third is None else np.split(theirs, 3)[self.third])


@dataclass(frozen=True)
class NameRules:
    """A family's table, and the official names that are nobody's parameter (regular expressions).

    `copies`: (regular expression of a name, name that the official state dict has for the same array once more).
    `tied`: (regular expression of a name, name whose array it has in files that lack it, though not in all files).
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()


class LoadReport(NamedTuple):
    """What became of the names in a state dict."""

    loaded: list[str]
    ignored: list[str]


# ------------------------------------------------------------------------------------------------ both directions


def from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], rules: NameRules, *, source: str | Path
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """{our path: array} of a whole state dict, for a model whose paths have these `shapes`.

    Raises UserError, naming `source` and the parameters, for names that are missing, left over or of another shape,
    and for copies that differ from what they are copies of. Copies may be missing.
    """
    entries = _entries(shapes, rules)
    known = {name for _, _, names in entries for name in names}
    copies = copies_of(known, rules)
    ignored = [
        name
        for name in state
        if name not in known and (name in copies or any(re.search(p, name) for p in rules.ignored))
    ]
    _refuse(source, "lacks", [name for name in sorted(known) if name not in state], "which this model needs")
    leftovers = [name for name in state if name not in known and name not in set(ignored)]
    _refuse(source, "holds", leftovers, "which this model does not have")
    different = [
        copy for copy, name in copies.items() if copy in state and not np.array_equal(state[copy], state[name])
    ]
    _refuse(source, "holds", different, "which should be copies of other arrays but differ from them")

    arrays = {}
    for path, rule, names in entries:
        theirs = rule.shape_of_theirs(shapes[path])
        for name in names:
            if state[name].shape != theirs:
                raise UserError(
                    f"{name} has the shape {list(state[name].shape)} in {source} and {list(theirs)} in this model."
                )
        layers = [rule.from_theirs(state[name]) for name in names]
        arrays[path] = layers[0] if rule.first_layer is None else np.stack(layers)
    return arrays, LoadReport(sorted(known), ignored)


def to_torch(arrays: Mapping[str, np.ndarray], rules: NameRules) -> dict[str, np.ndarray]:
    """The official state dict of {our path: array}, without copies; `from_torch` gives the same arrays back."""
    parts: dict[str, dict] = {}  # name: {third or None: array in their layout}
    for path, rule, names in _entries({path: np.shape(array) for path, array in arrays.items()}, rules):
        layers = [arrays[path]] if rule.first_layer is None else arrays[path]
        for name, layer in zip(names, layers, strict=True):
            parts.setdefault(name, {})[rule.third] = rule.layout.to_theirs(np.asarray(layer))
    for name, theirs in parts.items():
        if set(theirs) not in ({None}, {0, 1, 2}):
            raise ValueError(f"{name} is put together from the thirds {sorted(theirs)} only.")
    return {name: np.concatenate([theirs[third] for third in sorted(theirs)]) for name, theirs in parts.items()}


def copies_of(names: Iterable[str], rules: NameRules) -> dict[str, str]:
    """{copy: the one of `names` whose array it repeats}."""
    found = {}
    for name in names:
        for pattern, copy in rules.copies:
            if match := re.fullmatch(pattern, name):
                found[match.expand(copy)] = name
    return found


def with_originals(state: Mapping[str, np.ndarray], names: Iterable[str], rules: NameRules) -> dict[str, np.ndarray]:
    """`state`, and where it lacks one of `names` but has a copy of it, that: files may keep any one of equal arrays."""
    found = {name: state[copy] for copy, name in copies_of(names, rules).items() if copy in state}
    whole = {**found, **state}
    for name in names:
        for pattern, other in rules.tied:
            match = re.fullmatch(pattern, name)
            if match and name not in whole and (first := match.expand(other)) in whole:
                whole[name] = whole[first]
    return whole


def with_copies(state: Mapping[str, np.ndarray], rules: NameRules) -> dict[str, np.ndarray]:
    """What `to_torch` gives, with the arrays that the official state dict holds more than once."""
    return {**state, **{copy: state[name] for copy, name in copies_of(state, rules).items()}}


def torch_shapes(module: nnx.Module, rules: NameRules) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of the state dict that fits `module`, which may be abstract (`nnx.eval_shape`)."""
    _, params, others = take_apart(module)
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in {**params, **others}.items()}
    return {name: array.shape for name, array in to_torch(zeros, rules).items()}


def official_names(shapes: Mapping[str, tuple[int, ...]], rules: NameRules) -> dict[str, list[str]]:
    """{our path: its official names, one a layer}, for a model whose paths have these `shapes`."""
    return {path: names for path, _, names in _entries(shapes, rules)}


def _entries(shapes: Mapping[str, tuple[int, ...]], rules: NameRules) -> list[tuple[str, Rule, list[str]]]:
    """(path, rule, official names) of every path; a path without a name is an error."""
    entries, homeless = [], []
    for path, shape in shapes.items():
        found = [(rule, match) for rule in rules.rules if (match := re.fullmatch(rule.path, path))]
        if len(found) > 1:
            raise ValueError(f"Several name rules fit {path}: {', '.join(rule.path for rule, _ in found)}.")
        names = []
        for rule, match in found:
            layers = 1 if rule.first_layer is None else shape[0]
            names = [match.expand(rule.name).format(layer=(rule.first_layer or 0) + i) for i in range(layers)]
        if not names or len(set(names)) < len(names):
            homeless.append(path)
        else:
            entries.append((path, found[0][0], names))
    _refuse("This model", "has", homeless, "for which the published checkpoints have no name")
    return entries


def _refuse(source, verb: str, names: list[str], why: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{source} {verb} {', '.join(names[:3])}{more}, {why}.")

"""A state dict -> all arrays of a detector, and what a person should know about where each comes from."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.models import abstract_detector, build_detector
from deperceiver_jax.models.heads.heads import CLASS_HEAD
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.weights.backbone import backbone_from_torch
from deperceiver_jax.weights.name_rules import (
    NameRules,
    copies_of,
    from_torch,
    official_names,
    torch_shapes,
    with_originals,
)
from deperceiver_jax.weights.tables import LAYOUTS, layout_of

QUERIES = ("decoder/query_position", "queries")  # the path of the object queries, whichever the family has
# Parameters whose number of rows the config takes from the file: {path: field of config.model}
FOLLOWED = {**dict.fromkeys(QUERIES, "num_queries"), "encoder/latents": "encoder.num_latents"}


class Imported(NamedTuple):
    """All arrays of a detector by path, and what a person should know about where they come from."""

    arrays: dict[str, np.ndarray]
    notes: list[str]


def without_wrapper(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict without the `module.` that DistributedDataParallel puts before every name."""
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: array for name, array in state.items()}


def import_backbone(config: ConfigDict, state: Mapping[str, np.ndarray], source: Path) -> Imported:
    """The backbone of `state`, and everything else new. Raises UserError."""
    shapes = abstract_arrays(config)
    arrays = backbone_from_torch(state, {path: x.shape for path, x in shapes.items()}, source=source)
    new = sorted(shapes.keys() - arrays.keys())
    notes = [
        f"Loaded: the backbone, {len(arrays)} parameters, from the ResNet in {source}.",
        f"Re-initialised: the other {len(new)} parameters, because {source} holds only a ResNet.",
    ]
    return Imported(typed({**arrays, **new_arrays(config, new)}, shapes), notes)


def import_detector(
    config: ConfigDict,
    state: Mapping[str, np.ndarray],
    source: Path,
    *,
    given: set[str],
    other_classes: bool,
    allow_leftovers: bool,
) -> Imported:
    """A whole detector from `state`. Changes the fields of `config` that follow the file and are not in `given`.

    other_classes: whether the class head may be one of another number of classes, and start anew.
    Raises UserError, naming the parameter, for what does not fit.
    """
    rules = rules_for(config, state, source)
    shapes = abstract_arrays(config)
    names = official_names({path: x.shape for path, x in shapes.items()}, rules)
    state = with_originals(state, {name for theirs in names.values() for name in theirs}, rules)
    require_same_architecture(state, names, source, config.model.name)
    notes = follow_file(config, state, names, given)
    shapes, theirs = abstract_arrays(config), official_shapes(config, rules)

    new = changed_class_head(state, names, theirs)  # {path: why it starts anew}
    if new and not other_classes:
        raise UserError(f"{source}: {next(iter(new.values()))}: give --classes=FILE or --num_classes=N.")
    queries = changed_queries(state, names, theirs)
    new |= queries
    left_out = {name for path in new for name in names[path]}
    left_out |= copies_of(left_out, rules).keys()
    if allow_leftovers:
        absent = {path for path in names.keys() - new.keys() if any(name not in state for name in names[path])}
        new |= dict.fromkeys(sorted(absent), "it is not in the file")
        known = left_out | {name for path in names.keys() - new.keys() for name in names[path]}
        known |= copies_of(known, rules).keys()
        unknown = [n for n in state if n not in known and not any(re.search(p, n) for p in rules.ignored)]
        notes += [f"Passed over: {name}, for which this model has no place." for name in unknown]
        left_out |= set(unknown)
    arrays, report = from_torch(
        {name: array for name, array in state.items() if name not in left_out},
        {path: x.shape for path, x in shapes.items() if path not in new},
        rules,
        source=source,
    )

    fresh = new_arrays(config, sorted(new))
    for path in queries:
        rows = state[names[path][0]][: len(fresh[path])]
        fresh[path][: len(rows)] = rows
    notes.insert(0, f"Loaded: {len(report.loaded)} arrays of {source} into {len(arrays)} parameters.")
    if report.ignored:
        notes.append(f"Passed over: {len(report.ignored)} arrays that are no parameters, such as {report.ignored[0]}.")
    notes += [f"Re-initialised: {path}: {reason}." for path, reason in new.items()]
    return Imported(typed({**arrays, **fresh}, shapes), notes)


def rules_for(config: ConfigDict, state: Mapping[str, np.ndarray], source: Path) -> NameRules:
    """The table of the program that wrote `state`, for the detector of `config`. Raises UserError for none."""
    name, layout = config.model.name, layout_of(state)
    if name not in LAYOUTS["official"]:
        raise UserError(f"--config: there are no published weights that {name} could take.")
    if name not in LAYOUTS[layout]:
        raise UserError(f"{source} is of another architecture than {name}: it holds {next(iter(state))}.")
    return LAYOUTS[layout][name](config.model)


def changed_class_head(state, names: Mapping[str, list[str]], theirs: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{path: reason} of the class head's parameters, when the file's is one of another number of classes."""
    head = [path for path in names if CLASS_HEAD in path]
    for name in (name for path in head for name in names[path]):
        if name in state and state[name].shape[:1] != theirs[name][:1]:
            reason = f"{name} has the shape {list(state[name].shape)}, and these classes need {list(theirs[name])}"
            return dict.fromkeys(head, reason)
    return {}


def changed_queries(state, names: Mapping[str, list[str]], theirs: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{path: reason} of the object queries, when the file has another number of them."""
    changed = {}
    for path, name in ((path, names[path][0]) for path in QUERIES if path in names):
        mine, found = theirs[name], tuple(state[name].shape) if name in state else ()
        if found[:1] != mine[:1] and found[1:] == mine[1:]:
            count = min(found[0], mine[0])
            changed[path] = f"the file has {found[0]}, and the first {count} of these {mine[0]} are its"
    return changed


def require_same_architecture(state, names: Mapping[str, list[str]], source: Path, model: str) -> None:
    """Raises UserError when `state` lacks most of what is not a backbone's. A few differences are named elsewhere."""
    wanted = sorted({n for path in names if not path.startswith("backbone/") for n in names[path]})
    lacks = [name for name in wanted if name not in state]
    if 2 * len(lacks) > len(wanted):
        raise UserError(
            f"{source} is of another architecture than {model}: it lacks {', '.join(lacks[:3])} "
            f"and {len(lacks) - 3} more of {len(wanted)} parameters."
        )


def follow_file(config: ConfigDict, state, names: Mapping[str, list[str]], given: set[str]) -> list[str]:
    """Sets the fields of FOLLOWED to the file's sizes, where `given` does not name them. Returns what to say."""
    notes = []
    for path, field in FOLLOWED.items():
        name = names[path][0] if path in names else None
        if name not in state or field in given or not state[name].ndim:
            continue
        *sections, last = field.split(".")
        section = config.model[sections[0]] if sections else config.model
        if section[last] != len(state[name]):
            section[last] = len(state[name])
            notes.append(
                f"The file has config.model.{field}={section[last]}: train.py needs it beside config.init_from."
            )
    return notes


def abstract_arrays(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and type} of all arrays of the detector that `config` describes."""
    _, params, others = take_apart(abstract_detector(config))
    return {**params, **others}


def official_shapes(config: ConfigDict, rules: NameRules) -> dict[str, tuple[int, ...]]:
    """{official name: shape} that the detector of `config` needs."""
    return torch_shapes(abstract_detector(config), rules)


def new_arrays(config: ConfigDict, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """New values of these arrays, as training would start them from config.seed."""
    if not paths:
        return {}
    _, params, others = take_apart(build_detector(config, rngs=nnx.Rngs(config.seed)))
    return {path: np.array({**params, **others}[path]) for path in paths}


def typed(arrays: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The arrays in the types of the parameters, each contiguous: a file may hold them in half precision."""
    return {path: np.ascontiguousarray(arrays[path], x.dtype) for path, x in like.items()}

"""Turns published PyTorch weights into a directory that eval.py, predict.py and config.init_from of train.py take.

    python -m deperceiver_jax.import_weights --config=configs/detr.py:r50 --torch=detr-r50-e632da11.pth --output=DIR

Reads, without PyTorch and without running anything that is in the file: the released .pth of DETR and
Deformable DETR, what the released code of SMCA saves, a Lightning .ckpt of DePerceiver, the safetensors of transformers
for both DETRs, and ResNets of torchvision and timm (then all but the backbone is new).
The numbers of latents and queries are the file's, unless --config.model.num_queries=N asks for more or fewer queries.

A file with other classes: --classes=FILE or --num_classes=N. If the file's class head is not of that many classes, it
starts anew and everything else is kept; queries are copied as far as they go.
"""

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.command_line import parse_config, parse_flags, run
from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.models import build_detector
from deperceiver_jax.training.start import CLASS_HEAD
from deperceiver_jax.training.stored_detector import save_params
from deperceiver_jax.training.train_state import take_apart
from deperceiver_jax.training.workdir import read_classes
from deperceiver_jax.weights import read_state_dict
from deperceiver_jax.weights.backbone import backbone_from_torch, is_only_a_backbone
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


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("torch", None, "The weights: .pth, .pt, .bin, .ckpt or .safetensors.", flag_values=values)
    flags.DEFINE_string("output", None, "The directory to be made.", flag_values=values)
    flags.DEFINE_string("classes", None, "A classes.json; COCO's 91 class slots without it.", flag_values=values)
    flags.DEFINE_integer("num_classes", None, "So many classes without names, instead.", flag_values=values)
    flags.DEFINE_bool(
        "allow_leftovers",
        False,
        "Pass over what the model has no place for, and start anew what the file lacks.",
        flag_values=values,
    )


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    for name in ("torch", "output"):
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")
    source, output = Path(values.torch).expanduser(), Path(values.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists already.")
    config = parse_config(config_arguments)
    classes = choose_classes(values.classes, values.num_classes)
    other_classes = values.classes is not None or values.num_classes is not None

    state = without_wrapper(read_state_dict(source))
    config.model.num_classes = classes.num_slots
    config.model.backbone.weights = config.init_from = ""  # these arrays take their place
    if is_only_a_backbone(state):
        imported = import_backbone(config, state, source)
    else:
        imported = import_detector(
            config,
            state,
            source,
            given=overridden(config_arguments),
            other_classes=other_classes,
            allow_leftovers=values.allow_leftovers,
        )
    write_directory(output, imported.arrays, config, classes)
    print("\n".join(imported.notes))
    print(f"Wrote {output}, {sum(x.size for x in imported.arrays.values()) / 1e6:.1f} M numbers.")


def choose_classes(classes: str | None, num_classes: int | None) -> ClassMap:
    """The class map of --classes or --num_classes, else COCO's. Raises UserError."""
    if classes is not None and num_classes is not None:
        raise UserError("--classes and --num_classes are both given; only one can be.")
    if classes is not None:
        return read_classes(Path(classes).expanduser())
    if num_classes is None:
        return ClassMap.from_categories(COCO_CATEGORIES.items())
    if num_classes < 1:
        raise UserError(f"--num_classes is {num_classes}; it must be at least 1.")
    slots = tuple(range(num_classes))
    return ClassMap(slots, tuple(f"class {slot}" for slot in slots), slots, num_classes)


def overridden(config_arguments: Sequence[str]) -> set[str]:
    """The fields of config.model that the command line sets, for example {"num_queries"}."""
    return {match[1] for a in config_arguments if (match := re.match(r"--?config\.model\.([^=]+)=", a))}


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
        mine, found = theirs[name], state[name].shape if name in state else ()
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
    _, params, others = take_apart(nnx.eval_shape(lambda: build_detector(config, rngs=nnx.Rngs(0))))
    return {**params, **others}


def official_shapes(config: ConfigDict, rules: NameRules) -> dict[str, tuple[int, ...]]:
    """{official name: shape} that the detector of `config` needs."""
    return torch_shapes(nnx.eval_shape(lambda: build_detector(config, rngs=nnx.Rngs(0))), rules)


def new_arrays(config: ConfigDict, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """New values of these arrays, as training would start them from config.seed."""
    if not paths:
        return {}

    @jax.jit
    def initialize():
        _, params, others = take_apart(build_detector(config, rngs=nnx.Rngs(config.seed)))
        return {path: {**params, **others}[path] for path in paths}  # the compiler leaves out the rest

    return {path: np.array(x) for path, x in initialize().items()}


def typed(arrays: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The arrays in the types of the parameters, each contiguous: a file may hold them in half precision."""
    return {path: np.ascontiguousarray(arrays[path], x.dtype) for path, x in like.items()}


def write_directory(output: Path, arrays: Mapping[str, np.ndarray], config: ConfigDict, classes: ClassMap) -> None:
    """Makes `output` whole or not at all. Raises UserError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
            whole = Path(partial) / output.name
            save_params(whole, arrays, json.dumps(config.to_dict(), indent=2) + "\n", classes.to_json())
            whole.rename(output)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror or error}.") from None


if __name__ == "__main__":
    sys.exit(run(main))

"""What a workdir says about its run: config.json and classes.json, and whether a command may continue it."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from deperceiver_jax import __version__
from deperceiver_jax.data.classes import ClassMap, require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import write_whole
from deperceiver_jax.runs.migrations import migrate

CONFIG = "config.json"
CLASSES = "classes.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"

# Fields, or whole sections, that may differ when a run is continued: they decide how long it goes on, where and how it
# runs and what it reports, not what the next step computes.
MAY_CHANGE = (
    "data.directory",
    "data.prepared_directory",
    "data.num_workers",
    "eval",
    "mesh",
    "train",
)


def flat_fields(config: ConfigDict) -> dict[str, object]:
    """{"data.batch_size": 16, ...}: every field of a config by its full name."""
    fields: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= {f"{name}.{inner}": leaf for inner, leaf in flat_fields(value).items()}
        else:
            fields[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    return fields


def check_workdir(workdir: Path, config: ConfigDict, classes: ClassMap) -> None:
    """Raises UserError when `workdir` holds another run than that of `config` and `classes`. Writes nothing."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir} is not a directory.")
    if not (workdir / CONFIG).exists():
        if (workdir / CHECKPOINTS).exists():
            raise UserError(f"{workdir} holds checkpoints but no {CONFIG}: take another --workdir.")
        return
    stored, given = flat_fields(read_config(workdir / CONFIG)), flat_fields(config)
    absent = object()
    changed = [
        f"{name} ({stored.get(name, 'absent')!r}, now {given.get(name, 'absent')!r})"
        for name in sorted(stored.keys() | given.keys())
        if stored.get(name, absent) != given.get(name, absent)
        and not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise UserError(f"{workdir} holds another run, whose config differs: {listed}. Take another --workdir.")
    require_same_classes(classes, "the data set", read_classes(workdir / CLASSES), str(workdir / CLASSES))


def write_workdir(workdir: Path, config: ConfigDict, classes: ClassMap) -> None:
    """Makes `workdir` with its config.json and classes.json; each file appears whole or not at all."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / CLASSES, classes.to_json())
        write_whole(workdir / CONFIG, config_text(config))
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written: {error.strerror}.") from None


def config_text(config: ConfigDict) -> str:
    """The text of config.json: the resolved config, and the version of this package."""
    return json.dumps({"version": __version__, **config.to_dict()}, indent=2) + "\n"


def read_config(path: Path) -> ConfigDict:
    """A stored config, of this version or an earlier one, as this version's fields. Raises UserError.

    JSON knows only lists; every sequence of a config is a tuple.
    """
    try:
        return ConfigDict(_tuples(migrate(json.loads(path.read_text()), path)))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a stored config: {error}.") from None


def read_classes(path: Path) -> ClassMap:
    """The class map of a workdir or an import. Raises UserError."""
    try:
        return ClassMap.from_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a class map.") from None


def _tuples(value):
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value

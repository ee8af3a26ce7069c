"""What a workdir says about its run: config.json, classes.json and data.json, and whether a command may continue it."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from deperceiver_jax import __version__
from deperceiver_jax.data.classes import ClassMap, require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import is_bucket, is_folder, make_folder, reason, write_whole
from deperceiver_jax.runs.migrations import migrate

if TYPE_CHECKING:  # a data set's libraries take a second, which no help text needs
    from deperceiver_jax.data import Source

Fingerprint = Mapping[str, int | str]

CONFIG = "config.json"
CLASSES = "classes.json"
DATA = "data.json"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"

# Fields, or whole sections, that may differ when a run is continued: they decide how long it goes on, where and how it
# runs and what it reports, not what the next step computes.
MAY_CHANGE = (
    "data.allow_changed",
    "data.directory",
    "data.prepared_directory",
    "data.num_workers",
    "eval",
    "mesh",
    "train",
)
MAY_NOT_CHANGE = ("train.overfit",)  # of those


@contextlib.contextmanager
def keep_others_out(workdir: Path, *, new: bool = False) -> Iterator[None]:
    """Holds the workdir's lock, which the system releases when its process dies. Makes the workdir if need be.

    Raises UserError when another run holds it, when it cannot be written, and when another run has begun in it although
    it was to be `new`. Several processes of one run are one run: the first one takes the lock. A bucket has no locks;
    there the run that began last owns the workdir (runs/mirror.py).
    """
    if is_bucket(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a")
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written: {reason(error)}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir: another run is at work in {workdir}; take another one.") from None
        except OSError as error:
            why = f"its file system has no locks ({reason(error)})"
            print(f"warning: nothing keeps a second run out of {workdir}: {why}.", file=sys.stderr, flush=True)
        if new and (workdir / CONFIG).exists():
            raise UserError(f"--workdir: another run began in {workdir} at the same time; take another one.")
        yield


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
    try:
        if not is_bucket(workdir):
            os.lstat(workdir / CHECKPOINTS / ("x" * 200))  # the longest name that may come to lie in it
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be used: {reason(error)}.") from None
    if workdir.exists() and not is_folder(workdir):
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
        and (name in MAY_NOT_CHANGE or not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE))
    ]
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise UserError(f"{workdir} holds another run, whose config differs: {listed}. Take another --workdir.")
    require_same_classes(classes, "the data set", read_classes(workdir / CLASSES), str(workdir / CLASSES))


def data_fingerprint(source: "Source") -> Fingerprint:
    """By which a data set is known again: counts, and a hash of names, sizes and targets of its images."""
    hashed, boxes = hashlib.sha256(source.sizes.tobytes()), 0
    for position in range(len(source)):
        corners, labels = source.targets(position)
        hashed.update(b"\0".join((source.filename(position).encode(), corners.tobytes(), labels.tobytes())))
        boxes += len(labels)
    return {"images": len(source), "boxes": boxes, "hash": hashed.hexdigest()}


def tell_apart(data: Fingerprint, other: Fingerprint) -> tuple[str, str]:
    """What two fingerprints, which differ, are of, in words."""
    told, others = (f"{each['images']} images with {each['boxes']} boxes" for each in (data, other))
    return told, "as many, but other ones" if told == others else others


def check_data(workdir: Path, data: Fingerprint) -> None:
    """Raises UserError when the run in `workdir` was trained on other data than `data`, a fingerprint.

    A run that noted none, one of 0.1.0, may have been trained on anything.
    """
    try:
        stored = json.loads((workdir / DATA).read_text())
        before, now = tell_apart(stored, data)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{workdir / DATA} cannot be read; without it the run goes on with any data.") from None
    if stored != data:
        raise UserError(
            f"The training split is not what {workdir} was trained on: {before} then, {now} now. Take another "
            "--workdir, or go on all the same with --config.data.allow_changed=True."
        )


def write_workdir(workdir: Path, config: ConfigDict, classes: ClassMap, data: Fingerprint | None = None) -> None:
    """Makes `workdir` with its config.json, classes.json and, of `data`, data.json; each file appears whole or not."""
    try:
        make_folder(workdir)
        write_whole(workdir / CLASSES, classes.to_json())
        if data is not None:
            write_whole(workdir / DATA, json.dumps(data) + "\n")
        write_whole(workdir / CONFIG, config_text(config))
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written: {reason(error)}.") from None


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
        where = path if is_folder(path.parent) else path.parent
        raise UserError(f"{where} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a stored config: {error}.") from None


def read_classes(path: Path) -> ClassMap:
    """The class map of a workdir or an import. Raises UserError."""
    try:
        return ClassMap.from_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a class map.") from None


def _tuples(value):
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value

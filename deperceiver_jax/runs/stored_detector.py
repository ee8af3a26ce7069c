"""Detectors' parameters by themselves: found in a workdir or beside one, or on the hub, read, and written.

The output of import_weights is a directory with `weights`, config.json and classes.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, is_bucket, is_folder, make_folder, require_readable, write_whole
from deperceiver_jax.runs.checkpoint_files import (
    EMA,
    WEIGHTS,
    all_steps,
    best_step,
    damage_is_a_user_error,
    plain_path,
    read_shapes,
)
from deperceiver_jax.runs.migrations import renamed_paths
from deperceiver_jax.runs.published_detector import is_published, published_classes, published_config, published_params
from deperceiver_jax.runs.workdir import CHECKPOINTS, CLASSES, CONFIG, read_classes, read_config
from deperceiver_jax.weights import hub


class StoredDetector(NamedTuple):
    """Where a detector's parameters lie, and the directory of the config.json and classes.json that describe it."""

    items: Path
    directory: Path
    step: int | None  # None for parameters that no run here has trained

    def read_config(self) -> ConfigDict:
        """The config that it was stored with, or that transformers' one means. Raises UserError."""
        return published_config(self.directory) if self.items.is_file() else read_config(self.directory / CONFIG)

    def read_classes(self) -> ClassMap:
        """What its class slots mean. Raises UserError."""
        return published_classes(self.directory) if self.items.is_file() else read_classes(self.directory / CLASSES)


def local_directory(place: str | Path) -> Path:
    """The directory, of this machine or in a bucket, that a workdir, --weights or config.init_from means; all of them
    pass here. A name of the hub means the folder in which its files lie when they have been fetched.

    Raises UserError for a bucket that is not there or does not permit reading, and as weights/hub.py's `fetch` does.
    """
    if isinstance(place, str) and hub.is_hub_name(place):
        return hub.fetch(place)
    path = as_path(place)
    require_readable("A detector", path)
    if is_bucket(path):
        return path
    return path.resolve() if ".." in path.parts else path  # which TensorStore does not read


def find_detector(place: str | Path, checkpoint: str = "latest") -> StoredDetector:
    """Finds the parameters in a workdir (its checkpoint `latest`, `best` or a step number), in a checkpoint step
    (runs/x/checkpoints/1000), in an output of import_weights, in a folder that transformers wrote, or on the hub
    (hf://owner/name). Raises UserError when there are none."""
    directory = local_directory(place)
    if not is_folder(directory):
        raise UserError(f"{directory} is not a directory.")
    if is_folder(directory / WEIGHTS):
        whole = directory if is_bucket(directory) else directory.absolute()
        step, parent = whole.name, whole.parent
        if checkpoint not in ("latest", step):
            raise UserError(f"Checkpoint {checkpoint} is asked for, but {directory} is one, without others in it.")
        if parent.name == CHECKPOINTS and step.isdecimal() and not (directory / CONFIG).exists():
            return StoredDetector(directory, parent.parent, int(step))
        return StoredDetector(directory, directory, None)  # import_weights may have been told to write anywhere
    steps = all_steps(directory)
    if not steps and is_published(directory):
        return StoredDetector(directory / hub.WEIGHTS, directory, None)
    if not steps:
        raise UserError(f"{directory} has no checkpoint and no weights.")
    if checkpoint == "latest":
        step = steps[-1]
    elif checkpoint == "best":
        step = best_step(directory, steps)
        if step is None:
            raise UserError(f"{directory} has no best checkpoint: none of steps {steps} was evaluated.")
    elif checkpoint.isdecimal() and int(checkpoint) in steps:
        step = int(checkpoint)
    else:
        raise UserError(f"{directory} has no checkpoint {checkpoint!r}; it has {steps}, latest and best.")
    return StoredDetector(directory / CHECKPOINTS / str(step), directory, step)


def load_params(items: Path) -> dict[str, np.ndarray]:
    """Every array of a detector by path, from `StoredDetector.items`; the moving average where one was kept.

    Raises UserError when the files are damaged.
    """
    if items.is_file():
        return published_params(items)
    arrays = _read_arrays(items / WEIGHTS)
    if is_folder(items / EMA):
        arrays |= _read_arrays(items / EMA)
    return arrays


def save_params(directory: Path, arrays: Mapping[str, Array | np.ndarray], config: str, classes: str) -> None:
    """Writes a directory that load_detector, init_from and eval.py read: weights, and the texts of the two JSON files.

    Raises UserError when there is something at `directory` already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already.")
    make_folder(directory)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(plain_path(directory) / WEIGHTS, dict(arrays))
    write_whole(directory / CLASSES, classes)
    write_whole(directory / CONFIG, config)


def _read_arrays(item: Path) -> dict[str, np.ndarray]:
    shapes = read_shapes(item)
    restore_args = dict.fromkeys(shapes, ocp.RestoreArgs(restore_type=np.ndarray))
    with damage_is_a_user_error(item):
        arrays = ocp.PyTreeCheckpointHandler().restore(
            epath.Path(plain_path(item)), args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )
    names = renamed_paths(arrays)
    return {names.get(path, path): array for path, array in arrays.items()}

"""Checkpoints of a run, kept by Orbax, and parameters by themselves.

checkpoints/<step>/ has four items:

    weights    every array of the detector by path: all that inference needs
    ema        the moving average of the trained ones, which inference prefers; absent without one
    training   {"step", "opt_state"}
    progress   JSON of the host's side of a run

A save writes into a directory with another name, which gets its own when it is complete; what a killed process or a
full disk leaves behind is never taken for a checkpoint, and the next run removes it. A checkpoint that was damaged
later is called <step>.damaged when a run finds it, and the one before takes its place. The output of import_weights is
a directory with `weights`, config.json and classes.json.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array

from deperceiver_jax.errors import UserError
from deperceiver_jax.training.train_state import TrainState
from deperceiver_jax.training.workdir import CHECKPOINTS, CONFIG, METRICS

WEIGHTS, EMA, TRAINING, PROGRESS = "weights", "ema", "training", "progress"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on files

# Orbax's threads log every error with its traceback, and then raise it where it becomes a UserError.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


class DamagedCheckpoint(UserError):
    """Files that are there, but cannot be read."""


class FailedSave(UserError):
    """A checkpoint that could not be written."""


class KeepNewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the `newest` latest checkpoints, and the best one wherever it is."""

    def __init__(self, newest: int, best_step: Callable[[list[int]], int | None]):
        self.newest = newest
        self.best_step = best_step

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = {*sorted(steps)[-self.newest :], self.best_step(steps)}
        return [step in keep for step in steps]


class Checkpoints:
    """The checkpoints of a workdir. Saves in the background; every process of a run makes the same calls."""

    def __init__(self, workdir: Path, *, keep: int):
        if keep < 1:
            raise UserError(f"config.train.keep_checkpoints is {keep}; it must be at least 1.")
        self.workdir = workdir
        self.directory = workdir / CHECKPOINTS
        self.keep = keep

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager. It makes the directory, so it is made when a checkpoint is first read or written."""
        return ocp.CheckpointManager(
            self.directory.absolute(),
            item_handlers={
                WEIGHTS: ocp.StandardCheckpointHandler(),
                EMA: ocp.StandardCheckpointHandler(),
                TRAINING: ocp.StandardCheckpointHandler(),
                PROGRESS: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=KeepNewestAndBest(self.keep, lambda steps: best_step(self.workdir, steps)),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

    def save(self, state: TrainState, progress: dict) -> None:
        """Starts to save `state` under its step, unless that step is there already; waits for an earlier save first.

        Raises UserError when the earlier save, or what is written at once of this one, has failed.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = {
            WEIGHTS: ocp.args.StandardSave({**state.params, **state.frozen}),
            TRAINING: ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            PROGRESS: ocp.args.JsonSave(progress),
        }
        if state.ema:
            items[EMA] = ocp.args.StandardSave(state.ema)
        with self._failure_is_a_user_error():
            self.manager.wait_until_finished()
        self._require_space(state)
        with self._failure_is_a_user_error():
            self.manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """(state, progress) of a step, onto the shardings of `abstract`, whatever mesh they were saved from.

        Raises UserError when the parameters differ from those of `abstract`, or the files are damaged.
        """
        directory = self.directory / str(step)
        arrays = {**abstract.params, **abstract.frozen}
        require_same_arrays(arrays, read_shapes(directory / WEIGHTS), directory)
        items = {
            WEIGHTS: ocp.args.StandardRestore(arrays),
            TRAINING: ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
            PROGRESS: ocp.args.JsonRestore(),
        }
        if abstract.ema:
            items[EMA] = ocp.args.StandardRestore(abstract.ema)
        for item in items.keys() - {WEIGHTS, PROGRESS}:
            check_readable(directory / item)
        with damage_is_a_user_error(directory):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        weights = restored[WEIGHTS]
        state = TrainState(
            step=restored[TRAINING]["step"],
            params={path: weights[path] for path in abstract.params},
            frozen={path: weights[path] for path in abstract.frozen},
            opt_state=restored[TRAINING]["opt_state"],
            ema=restored[EMA] if abstract.ema else {},
        )
        return state, restored[PROGRESS]

    def latest_step(self) -> int | None:
        """The newest step that is saved, when all saves that were begun are done."""
        with self._failure_is_a_user_error():
            self.manager.wait_until_finished()
        return self.manager.latest_step()

    def set_aside(self, damaged: Mapping[int, DamagedCheckpoint], start: int) -> None:
        """Renames damaged checkpoints, so that the run that continues from `start` can save their steps again."""
        if jax.process_index() == 0:
            for step, error in damaged.items():
                path = self.directory / f"{step}.damaged"
                if path.exists():
                    shutil.rmtree(path)
                os.rename(self.directory / str(step), path)
                sentence = f"warning: {error} It is {path} now, and the run continues from step {start}."
                print(sentence, file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def close(self) -> None:
        """Waits until everything is written. Raises UserError when it could not be."""
        with self._failure_is_a_user_error():
            self.manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Waits until everything is written, unless an error ends one of several processes: the others may be gone."""
        if error is None:
            self.close()
        elif jax.process_count() == 1 and not isinstance(error, FailedSave):
            self.close()

    def _require_space(self, state: TrainState) -> None:
        """Takes as much room as `state` does and gives it back, so that a full disk, a quota or a limit shows before a
        save. One that fails in the middle is no more than a sentence late, but a loud one: Orbax closes its event loop
        with the first array's error, and the other arrays' threads print a traceback each when they cannot report."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if jax.process_index() == 0 and hasattr(os, "posix_fallocate"):  # macOS has none
            try:
                with tempfile.TemporaryFile(dir=self.directory) as file:  # without a name: nothing can stay behind
                    os.posix_fallocate(file.fileno(), 0, needed)
            except OSError as error:
                if error.errno in NO_ROOM:  # others: a file system that cannot tell
                    self._fail(f"{reason(error)} (it needs {needed / 1e6:.3g} MB)", error)

    @contextlib.contextmanager
    def _failure_is_a_user_error(self) -> Iterator[None]:
        """A full disk, for example: what Orbax and TensorStore raise when they cannot write -> one sentence."""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            self._fail(reason(error), error)

    def _fail(self, why: str, error: Exception | None = None):
        kept = all_steps(self.workdir)
        kept = f"the newest one there is of step {kept[-1]}" if kept else "there is none yet"
        raise FailedSave(f"A checkpoint cannot be written to {self.directory}: {why}; {kept}.") from error


def all_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's complete checkpoints, in ascending order."""
    directory = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def newest_whole(workdir: Path) -> tuple[int, dict[int, DamagedCheckpoint]]:
    """(the newest step whose checkpoint can be read, the error of each after it); (0, {}) for a run without any.

    Process 0 reads them and tells the others the step. Raises the newest one's DamagedCheckpoint when all are damaged.
    """
    found, damaged = 0, {}
    if jax.process_index() == 0:
        for step in reversed(all_steps(workdir)):
            try:
                check_whole(workdir / CHECKPOINTS / str(step))
                found = step
                break
            except DamagedCheckpoint as error:
                damaged[step] = error
        if damaged and not found:
            raise damaged[max(damaged)]
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(found))
    return found, damaged


def check_whole(directory: Path) -> None:
    """Raises DamagedCheckpoint unless everything that a run needs of a checkpoint can be read."""
    for item in (WEIGHTS, TRAINING, *([EMA] if (directory / EMA).is_dir() else [])):
        check_readable(directory / item)
        with damage_is_a_user_error(directory / item):
            ocp.PyTreeCheckpointHandler().metadata(epath.Path((directory / item).absolute()))
    with damage_is_a_user_error(directory / PROGRESS):
        ocp.JsonCheckpointHandler().restore(epath.Path((directory / PROGRESS).absolute()))


def best_step(workdir: Path, steps: Sequence[int]) -> int | None:
    """The one of `steps` with the highest AP that metrics.jsonl knows, the earliest among equals; None if none has."""
    try:
        text = (workdir / METRICS).read_text()
    except FileNotFoundError:
        return None
    whole = text[: text.rfind("\n") + 1]  # a run may be writing the next line
    lines = [json.loads(line) for line in whole.splitlines()]
    scores = {line["step"]: line["AP"] for line in lines if "AP" in line and line["step"] in steps}
    return max(sorted(scores), key=scores.get, default=None)


class StoredDetector(NamedTuple):
    """Where a detector's parameters lie, and the directory of the config.json and classes.json that describe it."""

    items: Path
    directory: Path
    step: int | None  # None for parameters that no run here has trained


def find_detector(directory: Path, checkpoint: str = "latest") -> StoredDetector:
    """Finds the parameters in a workdir (its checkpoint `latest`, `best` or a step number), in a checkpoint step
    (runs/x/checkpoints/1000) or in an output of import_weights. Raises UserError when there are none."""
    if (directory / WEIGHTS).is_dir():
        if directory.parent.name == CHECKPOINTS:
            return StoredDetector(directory, directory.parent.parent, int(directory.name))
        return StoredDetector(directory, directory, None)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"{directory} has no checkpoint and no weights.")
    if checkpoint == "latest":
        step = steps[-1]
    elif checkpoint == "best":
        step = best_step(directory, steps)
        if step is None:
            raise UserError(f"{directory} has no best checkpoint: none of steps {steps} was evaluated.")
    elif checkpoint.isdigit() and int(checkpoint) in steps:
        step = int(checkpoint)
    else:
        raise UserError(f"{directory} has no checkpoint {checkpoint!r}; it has {steps}, latest and best.")
    return StoredDetector(directory / CHECKPOINTS / str(step), directory, step)


def load_params(items: Path) -> dict[str, np.ndarray]:
    """Every array of a detector by path, from `StoredDetector.items`; the moving average where one was kept.

    Raises UserError when the files are damaged.
    """
    arrays = _read_arrays(items / WEIGHTS)
    if (items / EMA).is_dir():
        arrays |= _read_arrays(items / EMA)
    return arrays


def save_params(directory: Path, arrays: Mapping[str, Array | np.ndarray], config: str, classes: str) -> None:
    """Writes a directory that load_detector, init_from and eval.py read: weights, and the texts of the two JSON files.

    Raises UserError when there is something at `directory` already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already.")
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / WEIGHTS).absolute(), dict(arrays))
    (directory / "classes.json").write_text(classes)
    (directory / CONFIG).write_text(config)


def read_shapes(item: Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays in an item of a checkpoint, all of which can be read."""
    check_readable(item)
    with damage_is_a_user_error(item):
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(item.absolute())).tree
        return {path: tuple(array.shape) for path, array in tree.items()}


def require_same_arrays(expected: Mapping[str, Array], found: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    """Raises UserError when the arrays at `origin` are not those that the model has, by path and shape."""
    lacks = [f"it lacks {path}" for path in sorted(expected.keys() - found.keys())]
    extra = [f"the model lacks {path}" for path in sorted(found.keys() - expected.keys())]
    other = [
        f"{path} is {found[path]} there and {tuple(expected[path].shape)} in the model"
        for path in sorted(expected.keys() & found.keys())
        if found[path] != tuple(expected[path].shape)
    ]
    differences = other[:3] + lacks[:2] + extra[:2]
    if differences:
        more = len(other) + len(lacks) + len(extra) - len(differences)
        rest = f", and {more} more" if more else ""
        raise UserError(f"{origin} holds another model: {', '.join(differences)}{rest}.")


def _read_arrays(item: Path) -> dict[str, np.ndarray]:
    shapes = read_shapes(item)
    restore_args = dict.fromkeys(shapes, ocp.RestoreArgs(restore_type=np.ndarray))
    with damage_is_a_user_error(item):
        return ocp.PyTreeCheckpointHandler().restore(
            epath.Path(item.absolute()), args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )


def check_readable(item: Path) -> None:
    """Reads every record of an item once, one after the other. Orbax reads them all at once, so that a broken file
    ends in as many tracebacks, from other threads, as there are arrays; it gets only what passes here."""
    with damage_is_a_user_error(item):
        records = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item.absolute()}/"}).result()
        for key in records.list().result():
            records.read(key).result()


@contextlib.contextmanager
def damage_is_a_user_error(path: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for incomplete or broken files into one sentence."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise DamagedCheckpoint(f"{path} is damaged or incomplete: {reason(error)}.") from None


def reason(error: Exception) -> str:
    """Why a file could not be read or written: the system's word for it, or else the first sentence of the message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(code[1]) if code else getattr(error, "errno", None)
    return os.strerror(code) if code else str(error).split("[")[0].split("\n")[0].strip()[:300].rstrip(".:")

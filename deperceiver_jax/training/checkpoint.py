"""Checkpoints of a run, kept by Orbax.

checkpoints/<step>/ has four items:

    weights    every array of the detector by path: all that inference needs
    ema        the moving average of the trained ones, which inference prefers; absent without one
    training   {"step", "opt_state"}
    progress   JSON of the host's side of a run

A save writes into a directory with another name, which gets its own when it is complete; what a killed process or a
full disk leaves behind is never taken for a checkpoint, and the next run removes it. A checkpoint that was damaged
later is called <step>.damaged when a run finds it, and the one before takes its place.
"""

import contextlib
import errno
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import is_bucket, is_folder, reason, remove_folder, repeated_requests, told_when_slow
from deperceiver_jax.runs.checkpoint_files import (
    EMA,
    PROGRESS,
    TRAINING,
    WEIGHTS,
    DamagedCheckpoint,
    all_steps,
    best_step,
    check_readable,
    damage_is_a_user_error,
    plain_path,
    read_shapes,
    require_same_arrays,
)
from deperceiver_jax.runs.migrations import renamed_paths
from deperceiver_jax.runs.workdir import CHECKPOINTS
from deperceiver_jax.training.train_state import TrainState

WORTH_SHARING = 2**20  # bytes of an array for each of its replicas, from which on they share the writing of it
LONG_SAVE = 60  # seconds
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on files


def _is_news(record: logging.LogRecord) -> bool:
    """Not what Orbax's threads log of an error, which becomes a UserError, nor that the lines below take effect."""
    said = record.exc_info or "overriding" in record.msg
    return not (said and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_news)
# Orbax cuts every array into a slice a replica, which for small ones takes longer than writing them.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WORTH_SHARING)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)


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
        self._repeated = all_repeated_requests()

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager. It makes the directory, so it is made when a checkpoint is first read or written."""
        return ocp.CheckpointManager(
            plain_path(self.workdir) / CHECKPOINTS,
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
        self._wait()
        self._require_space(state)
        with self._failure_is_a_user_error(), self._told_when_slow():
            self.manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """(state, progress) of a step, onto the shardings of `abstract`, whatever mesh they were saved from.

        Raises UserError when the parameters differ from those of `abstract`, or the files are damaged.
        """
        directory = self.directory / str(step)
        shapes = read_shapes(directory / WEIGHTS)
        new_names = renamed_paths(shapes)
        old_names = {new: old for old, new in new_names.items()}
        arrays = {**abstract.params, **abstract.frozen}
        require_same_arrays(arrays, {new_names.get(path, path): shape for path, shape in shapes.items()}, directory)

        def restored_as(tree):
            return ocp.args.StandardRestore(_rename(tree, old_names))

        items = {
            WEIGHTS: restored_as(arrays),
            TRAINING: restored_as({"step": abstract.step, "opt_state": abstract.opt_state}),
            PROGRESS: ocp.args.JsonRestore(),
        }
        if abstract.ema:
            items[EMA] = restored_as(abstract.ema)
        for item in items.keys() - {WEIGHTS, PROGRESS}:
            check_readable(directory / item)
        with damage_is_a_user_error(directory), self._told_when_slow():
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        weights, training = (_rename(restored[item], new_names) for item in (WEIGHTS, TRAINING))
        state = TrainState(
            step=training["step"],
            params={path: weights[path] for path in abstract.params},
            frozen={path: weights[path] for path in abstract.frozen},
            opt_state=training["opt_state"],
            ema=_rename(restored[EMA], new_names) if abstract.ema else {},
        )
        return state, restored[PROGRESS]

    def latest_step(self) -> int | None:
        """The newest step that is saved, when all saves that were begun are done."""
        self._wait()
        return self.manager.latest_step()

    def set_aside(self, damaged: Mapping[int, DamagedCheckpoint], start: int) -> None:
        """Renames damaged checkpoints, so that the run that continues from `start` can save their steps again."""
        if jax.process_index() == 0:
            for step, error in damaged.items():
                path = self.directory / f"{step}.damaged"
                if path.exists():
                    remove_folder(path)
                (self.directory / str(step)).rename(path)
                sentence = f"warning: {error} It is {path} now, and the run continues from step {start}."
                print(sentence, file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def close(self) -> None:
        """Waits until everything is written. Raises UserError when it could not be."""
        self._wait()
        with self._failure_is_a_user_error():
            self.manager.close()

    def _wait(self) -> None:
        """Until the save that was begun is done."""
        with self._failure_is_a_user_error(), self._told_when_slow():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _told_when_slow(self) -> Iterator[None]:
        """Says when a bucket takes long, or has not taken requests at once; its libraries repeat them."""
        if not is_bucket(self.directory):
            yield
            return
        with told_when_slow(self.directory, LONG_SAVE):
            yield
        if repeated := all_repeated_requests() - self._repeated:
            self._repeated += repeated
            sentence = f"warning: {repeated} requests to {self.directory} were repeated; nothing is lost."
            print(sentence, file=sys.stderr, flush=True)

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
        if is_bucket(self.directory):  # which is never full
            return
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


def all_repeated_requests() -> int:
    """How many requests to buckets were repeated in this process, because they failed at first."""
    counted = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/retries")
    return repeated_requests() + sum(value["value"] for metric in counted for value in metric["values"])


def _rename(tree, names: Mapping[str, str]):
    """A tree whose dicts are keyed by path, in which some paths get other names."""

    def rename(node):
        return {names.get(path, path): _rename(x, names) for path, x in node.items()} if type(node) is dict else node

    return jax.tree.map(rename, tree, is_leaf=lambda node: type(node) is dict)


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
    for item in (WEIGHTS, TRAINING, *([EMA] if is_folder(directory / EMA) else [])):
        check_readable(directory / item)
        with damage_is_a_user_error(directory / item):
            ocp.PyTreeCheckpointHandler().metadata(epath.Path(plain_path(directory / item)))
    with damage_is_a_user_error(directory / PROGRESS):
        ocp.JsonCheckpointHandler().restore(epath.Path(plain_path(directory / PROGRESS)))

"""Prepares a data set once: one process at a time, and finished or not there at all."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from deperceiver_jax.data.datasets.tfds_directory import damage
from deperceiver_jax.errors import UserError

_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def prepare(
    builder_class: type[tfds.core.DatasetBuilder],
    directory: Path,
    config: tfds.core.BuilderConfig,
    what: str,
    num_bytes: int = 0,
) -> Path:
    """The directory where a builder's data lies under `directory`; writes it first if it is not there yet.

    config: one of the class's, or a new one; its version counts before the class's. `what` says what is prepared, and
    num_bytes, roughly, how much room it takes. What is there and not whole, since somebody deleted or cut files, is
    removed and written anew. Raises UserError for a place that cannot be read or written, or is too small.
    TFDS writes into a directory called `incomplete.*` and renames it at the end, so a killed preparation leaves nothing
    that looks finished; what it left is removed by the next one.
    """
    prepared = directory / builder_class.name / config.name / str(config.version or builder_class.VERSION)
    try:
        if prepared.is_dir() and damage(prepared) is None:
            return prepared
        with alone(directory):
            found = damage(prepared) if prepared.is_dir() else "it is not there"
            if found is not None:  # else another process has written it while this one waited
                if prepared.is_dir():
                    print(f"{prepared} is not whole: {found}. It is prepared anew.", file=sys.stderr, flush=True)
                    shutil.rmtree(prepared)
                for leftover in prepared.parent.glob("incomplete.*"):
                    shutil.rmtree(leftover)
                _require_room(directory, num_bytes, what)
                print(f"Preparing {what} in {prepared} (once).", file=sys.stderr, flush=True)
                with _quiet(), tempfile.TemporaryDirectory() as unused:
                    builder = builder_class(config=config, data_dir=os.fspath(directory), file_format="array_record")
                    builder.download_and_prepare(download_dir=os.path.join(unused, "downloads"))
                _tell_of_earlier(prepared)
    except OSError as error:
        raise UserError(f"Cannot prepare {what} in {prepared}: {error}.") from error
    except RuntimeError as error:  # of array_record's writer, whose text ends with the system's own words
        reason = next((text for text in map(os.strerror, _NO_ROOM) if text in str(error)), None)
        if reason is None:
            raise
        raise UserError(
            f"Cannot prepare {what} in {prepared}: {reason}; config.data.prepared_directory can be another place."
        ) from error
    return prepared


def _tell_of_earlier(prepared):
    """Says where the same files lie as they were before they changed, which another run may be reading yet."""
    earlier, num_bytes = [], 0
    for info in sorted(prepared.parents[1].glob("*/*/dataset_info.json")):
        if info.parent != prepared and _description(info) == _description(prepared / "dataset_info.json"):
            earlier.append(os.fspath(info.parent))
            num_bytes += sum(file.stat().st_size for file in info.parent.iterdir())
    if earlier:
        print(
            f"What was prepared of it before its files or fields changed takes {num_bytes / 1e6:.1f} MB in "
            f"{' and '.join(earlier)}; delete it when no run reads it any more.",
            file=sys.stderr,
            flush=True,
        )


def _description(info):
    try:
        return json.loads(info.read_text())["description"]
    except (OSError, ValueError, KeyError):
        return info  # like no other


def _require_room(directory, num_bytes, what):
    """A disk that is too small is told at once, not after an hour of writing."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise UserError(
            f"Cannot prepare {what} in {directory}: it takes {num_bytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
            "free; config.data.prepared_directory can be another place."
        )


@contextlib.contextmanager
def alone(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Holds the directory's lock of this name, which the system releases when its process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares data in {directory}.", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS's bars, prints and log speak of downloads; the builders of this package show a bar of their own."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()

"""Prepares a data set once: one process at a time, and finished or not there at all."""

import contextlib
import fcntl
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from deperceiver_jax.errors import UserError


def prepare(builder: tfds.core.DatasetBuilder, directory: Path, what: str) -> Path:
    """The prepared directory of a builder whose data_dir is `directory`; writes it first if it is not there yet.

    TFDS writes into a directory called `incomplete.*` and renames it at the end, so a killed preparation leaves nothing
    that looks finished; what it left is removed by the next one. `what` describes the work in one line.
    """
    prepared = Path(builder.data_dir)
    if prepared.is_dir():
        return prepared
    try:
        with _alone(directory):
            if not prepared.is_dir():  # another process may have written it while this one waited
                for leftover in prepared.parent.glob("incomplete.*"):
                    shutil.rmtree(leftover)
                print(f"Preparing {what} in {prepared} (once).", file=sys.stderr, flush=True)
                _download_and_prepare(builder)
    except OSError as error:
        raise UserError(f"Cannot prepare {what} in {prepared}: {error}.") from error
    return prepared


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, which the system releases when its process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares data in {directory}.", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download_and_prepare(builder):
    """TFDS's own bars and prints speak of downloads; the builders of this package show a bar of their own."""
    tfds.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=os.path.join(unused, "downloads"))
    finally:
        tfds.enable_progress_bar()

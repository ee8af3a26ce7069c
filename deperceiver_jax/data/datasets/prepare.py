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
from absl import logging

from deperceiver_jax.errors import UserError


def prepare(
    builder_class: type[tfds.core.DatasetBuilder], directory: Path, config: tfds.core.BuilderConfig, what: str
) -> Path:
    """The directory where a builder's data lies under `directory`; writes it first if it is not there yet.

    config: one of the class's, or a new one; its version counts before the class's. `what` says what is prepared.
    TFDS writes into a directory called `incomplete.*` and renames it at the end, so a killed preparation leaves nothing
    that looks finished; what it left is removed by the next one.
    """
    prepared = directory / builder_class.name / config.name / str(config.version or builder_class.VERSION)
    if prepared.is_dir():
        return prepared
    try:
        with _alone(directory):
            if not prepared.is_dir():  # another process may have written it while this one waited
                for leftover in prepared.parent.glob("incomplete.*"):
                    shutil.rmtree(leftover)
                print(f"Preparing {what} in {prepared} (once).", file=sys.stderr, flush=True)
                with _quiet(), tempfile.TemporaryDirectory() as unused:
                    builder = builder_class(config=config, data_dir=os.fspath(directory), file_format="array_record")
                    builder.download_and_prepare(download_dir=os.path.join(unused, "downloads"))
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

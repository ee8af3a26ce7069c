"""Files that are there whole or not at all, and places that are looked at before the work is done."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from deperceiver_jax.errors import UserError


def require_writable(flag: str, path: Path) -> None:
    """Raises UserError unless `path`, given as `flag`, can be written: a file or a folder, there already or not yet.

    Makes nothing. A disk that fills up meanwhile is another matter.
    """
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if place != path.absolute() and not os.path.isdir(place):
        raise UserError(f"{flag}: {path} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK if os.path.isdir(place) else os.W_OK):
        raise UserError(f"{flag}: {path} cannot be written: {place} does not permit it.")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends, and is gone when the block fails."""
    partial = path.with_name(f".{path.name[:60]}.partial")  # a name may be as long as the file system takes
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str | bytes) -> None:
    """Writes a text file, whole or not at all; bytes are UTF-8. Raises OSError."""
    with written_whole(path) as partial:
        if isinstance(text, bytes):
            partial.write_bytes(text)
        else:
            partial.write_text(text)

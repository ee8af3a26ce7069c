"""Paths that people give, on this machine or in a bucket; files that are there whole or not at all; places that are
looked at before the work is done.

A path of this machine is pathlib's. One in a bucket of Google Cloud Storage, gs://BUCKET/..., is etils.epath's, which
has the methods of pathlib that the package uses. A bucket has no folders, no appending and no renaming, and an object
appears in it whole.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from deperceiver_jax.errors import UserError

BUCKETS = "gs://"
PATIENCE = 5  # seconds after which a bucket is called slow that is asked for little
RIGHTS = ("list", "get", "create", "delete")  # on objects, which writing needs; overwriting is deleting, too
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def check_address(what: str, place: str, *, buckets: bool) -> None:
    """Raises UserError where `place`, given as `what`, is an address that is not read or written.

    buckets: whether it may be in a bucket.
    """
    if not _ADDRESS.match(place):
        return
    if not place.startswith(BUCKETS):
        raise UserError(
            f"{what} is {place}: of addresses with :// only {BUCKETS} is known, Google Cloud Storage, and hf:// for "
            "weights; another bucket can be mounted as a folder."
        )
    if not buckets:
        raise UserError(
            f"{what} is {place}: it is read from a disk of this machine; copy it, or mount the bucket (docs/pods.md)."
        )


def as_path(place: str | Path) -> Path:
    """What a person calls `place`: ~ is the home directory. Raises UserError for an address of no bucket."""
    if not is_bucket(place):
        check_address("A path", str(place), buckets=True)
        return Path(place).expanduser()
    if not re.fullmatch(r"gs://[^/]+(/[^\[\]*?#%\\]*)?", str(place)):
        raise UserError(f"{place} is not gs://BUCKET/... without any of the letters []*?#%\\.")
    os.environ.setdefault("EPATH_USE_TF", "false")  # or else TensorFlow, where it is installed, reads buckets its way
    from etils import epath

    return cast(Path, epath.Path(place))


def is_bucket(path: str | Path) -> bool:
    """Whether a path leads into a bucket."""
    return str(path).startswith(BUCKETS)


def file_system(what: str, path: Path) -> Any:
    """gcsfs for a path in a bucket, given as `what`. Raises UserError unless the bucket is there and may be listed."""
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what}: {path} needs {error.name}: pip install '.[gcs]'.") from None
    logger = logging.getLogger("gcsfs")  # it prints the traceback of what becomes a sentence here
    logger.handlers, logger.propagate = [_repeats], False
    logger.setLevel(logging.DEBUG)
    bucket = str(path).removeprefix(BUCKETS).split("/")[0]
    try:
        system = _epaths_own(path)
        system.dircache.use_listings_cache = False  # TensorStore and other processes write there, too
        with told_when_slow(path):
            system.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no bucket {BUCKETS}{bucket}.") from None
    except Exception as error:  # of the network, the credentials, the answer
        raise UserError(f"{what}: {path} cannot be read: {reason(error)}.") from error
    return system


def _epaths_own(path: Path) -> Any:
    """The file system object by which epath reads and writes in buckets."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(str(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder. Raises what a bucket answers that cannot tell, where `is_dir` would say no."""
    if not is_bucket(path):
        return os.path.isdir(path)  # Path.is_dir raises OSError for a name that is too long
    try:
        return _epaths_own(path).info(str(path))["type"] == "directory"
    except FileNotFoundError:
        return False


class _Repeats(logging.Handler):
    """Counts the requests that gcsfs repeats because they failed at first, which it tells in its log alone."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "retrying after exception" in str(record.msg)


_repeats = _Repeats()


def repeated_requests() -> int:
    """Of gcsfs to buckets, in this process; Orbax's are among them, TensorStore's are not."""
    return _repeats.count


def require_readable(what: str, path: Path) -> None:
    """Raises UserError where `path`, given as `what`, is in a bucket that is not there or does not permit reading."""
    if is_bucket(path):
        file_system(what, path)


def require_writable(what: str, path: Path) -> None:
    """Raises UserError unless `path`, given as `what`, can be written: a file or a folder, there already or not yet.

    Makes nothing. A disk that fills up meanwhile is another matter.
    """
    if is_bucket(path):
        _require_rights(what, path)
        return
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if place != path.absolute() and not os.path.isdir(place):
        raise UserError(f"{what}: {path} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK if os.path.isdir(place) else os.W_OK):
        raise UserError(f"{what}: {path} cannot be written: {place} does not permit it.")


def require_file(what: str, place: str | Path, endings: tuple[str, ...]) -> Path:
    """The path of a file that can be written, there already or not yet. Raises UserError, also for a name that does not
    end in one of `endings`."""
    path = as_path(place)
    if not str(place).lower().endswith(endings):
        raise UserError(f"{what}: {place} must end in {' or '.join(endings)}.")
    require_writable(what, path)
    if is_folder(path):
        raise UserError(f"{what}: {place} is a folder.")
    return path


def _require_rights(what: str, path: Path) -> None:
    system = file_system(what, path)
    bucket = str(path).removeprefix(BUCKETS).split("/")[0]
    asked = [f"storage.objects.{right}" for right in RIGHTS]
    try:
        answer = system.call("GET", "b/{}/iam/testPermissions", bucket, permissions=asked, json_out=True)
    except Exception as error:
        raise UserError(f"{what}: {path} cannot be written: {reason(error)}.") from error
    lacking = [right for right in asked if right not in answer.get("permissions", [])]
    if lacking:
        raise UserError(f"{what}: {path} cannot be written: {BUCKETS}{bucket} does not permit {', '.join(lacking)}.")


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of a folder of this machine and of those below it, each once, under its own name
    where it has one there and else under that of a link."""
    seen, waiting = set[str](), [os.fspath(folder)]
    while waiting:
        links = []
        for top in waiting:
            for place, folders, names in os.walk(top):
                real = os.path.realpath(place)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                yield place, names
                links += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
        waiting = sorted(links)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it. A bucket needs none. Raises OSError."""
    if not is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it. Raises OSError."""
    if is_bucket(path):
        cast(Any, path).rmtree()
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def written_whole(path: Path, ending: str = ".partial") -> Iterator[Path]:
    """A path of this machine to write to, which takes `path`'s place when the block ends, and is gone when it fails.

    ending: of its name, for writers that go by it.
    """
    if is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="deperceiver_jax_") as folder:
            partial = Path(folder, f"whole{ending}")
            yield partial
            _upload(partial, path)
        return
    partial = path.with_name(f".{path.name[:60]}{ending}")  # a name may be as long as the file system takes
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


def _upload(file: Path, path: Path) -> None:
    """Raises OSError, whatever gcsfs raises."""
    try:
        with told_when_slow(path):
            path.write_bytes(file.read_bytes())
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, reason(error), str(path)) from error


@contextlib.contextmanager
def told_when_slow(path: object, patience: float = PATIENCE) -> Iterator[None]:
    """Says so while a bucket takes longer than so many seconds, and when it has answered after all."""
    told = threading.Event()

    def tell() -> None:
        told.set()
        print(f"warning: waiting for {path} for more than {patience} s.", file=sys.stderr, flush=True)

    timer = threading.Timer(patience, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
        if told.is_set():
            print(f"{path} has answered; nothing is lost.", file=sys.stderr, flush=True)
    finally:
        timer.cancel()


def reason(error: BaseException) -> str:
    """Why a file could not be read or written: the system's word for it, or else the first sentence of the message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number and number > 0:  # below it are those of name resolution
        return os.strerror(number)
    text = str(getattr(error, "strerror", None) or error).split("[")[0].split("\n")[0].strip()[:300].rstrip(".:")
    return text or type(error).__name__


def bucket_error(error: BaseException) -> str:
    """What to say when `error` is a bucket's, met in the middle of the work; else nothing."""
    if not any(kind.__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google") for kind in type(error).__mro__):
        return ""
    return f"The bucket does not answer as it should: {reason(error)}. The same command continues a run."

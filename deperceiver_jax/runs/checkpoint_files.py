"""What lies in the checkpoints of a run, read without Orbax's manager: steps, items, shapes, and what is damaged."""

import atexit
import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import Array

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import BUCKETS, is_bucket, is_folder, reason
from deperceiver_jax.runs.metrics_file import read_metrics
from deperceiver_jax.runs.workdir import CHECKPOINTS, METRICS

WEIGHTS, EMA, TRAINING, PROGRESS = "weights", "ema", "training", "progress"
RECORDS_AT_ONCE = 64  # that a check reads side by side
COMMITTED = "commit_success.txt"  # of Orbax, in a complete directory of a bucket, which cannot be renamed at once
# What TensorStore says of a bucket that does not let it read, which is no damage.
_REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|HTTP response code: (?!404)")


class DamagedCheckpoint(UserError):
    """Files that are there, but cannot be read."""


def all_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's complete checkpoints, in ascending order."""
    directory = workdir / CHECKPOINTS
    steps = [path for path in directory.iterdir() if path.name.isdecimal()] if is_folder(directory) else []
    return sorted(int(path.name) for path in steps if not is_bucket(path) or (path / COMMITTED).exists())


def best_step(workdir: Path, steps: Sequence[int]) -> int | None:
    """The one of `steps` with the highest AP that metrics.jsonl knows, the earliest among equals; None if none has."""
    rows = [row for _, row in read_metrics(workdir / METRICS).rows if row["step"] in steps]
    scores = {row["step"]: ap for row in rows if isinstance(ap := row.get("AP"), (int, float)) and ap == ap}
    return max(sorted(scores), key=scores.__getitem__, default=None)


def plain_path(directory: Path) -> Path:
    """The absolute path of `directory`, or of a link to it where Orbax or TensorStore would take it for another.

    Orbax looks for files by patterns, to which [1] is a 1 and * any name; TensorStore takes a backslash for a slash.
    """
    if is_bucket(directory):
        return directory
    absolute = directory.absolute()
    return _linked(absolute) if re.search(r"[\[\]*?\\]", str(absolute)) else absolute


@functools.cache
def _linked(directory: Path) -> Path:
    """A link to `directory`, which is gone when the program ends."""
    links = tempfile.TemporaryDirectory(prefix="deperceiver_jax_")
    atexit.register(links.cleanup)
    link = Path(links.name) / "link"
    link.symlink_to(directory, target_is_directory=True)
    return link


def read_shapes(item: Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays in an item of a checkpoint, all of which can be read."""
    check_readable(item)
    with damage_is_a_user_error(item):
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(plain_path(item))).tree
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


def check_readable(item: Path) -> None:
    """Reads every record of an item once. A broken file among those that Orbax reads ends in as many tracebacks, from
    other threads, as there are arrays; it gets only what passes here."""
    with damage_is_a_user_error(item):
        base = {"driver": "file", "path": f"{plain_path(item)}/"}  # a URL would have to be quoted
        if is_bucket(item):
            bucket, _, folder = str(item).removeprefix(BUCKETS).partition("/")
            base = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
        records = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = records.list().result()
        for first in range(0, len(keys), RECORDS_AT_ONCE):
            for record in [records.read(key) for key in keys[first : first + RECORDS_AT_ONCE]]:
                record.result()


@contextlib.contextmanager
def damage_is_a_user_error(path: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for incomplete or broken files into one sentence.

    A bucket that does not let them be read is a plain UserError.
    """
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        if is_bucket(path) and _REFUSED.search(str(error)):
            raise UserError(f"{path} cannot be read: {reason(error)}.") from None
        raise DamagedCheckpoint(f"{path} is damaged or incomplete: {reason(error)}.") from None

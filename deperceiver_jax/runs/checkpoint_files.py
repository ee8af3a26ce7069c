"""What lies in the checkpoints of a run, read without Orbax's manager: steps, items, shapes, and what is damaged."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import Array

from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.workdir import CHECKPOINTS, METRICS

WEIGHTS, EMA, TRAINING, PROGRESS = "weights", "ema", "training", "progress"


class DamagedCheckpoint(UserError):
    """Files that are there, but cannot be read."""


def all_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's complete checkpoints, in ascending order."""
    directory = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def best_step(workdir: Path, steps: Sequence[int]) -> int | None:
    """The one of `steps` with the highest AP that metrics.jsonl knows, the earliest among equals; None if none has."""
    try:
        text = (workdir / METRICS).read_text()
    except FileNotFoundError:
        return None
    whole = text[: text.rfind("\n") + 1]  # a run may be writing the next line
    lines = [json.loads(line) for line in whole.splitlines()]
    scores = {line["step"]: line["AP"] for line in lines if "AP" in line and line["step"] in steps}
    return max(sorted(scores), key=scores.__getitem__, default=None)


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

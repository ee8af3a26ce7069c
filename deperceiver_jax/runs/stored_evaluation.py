"""What evaluations have written into a workdir."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import reason
from deperceiver_jax.runs.workdir import DATA, Fingerprint, data_fingerprint, tell_apart

if TYPE_CHECKING:
    from deperceiver_jax.data import Source


def newest_evaluation(workdir: Path) -> Path:
    """The directory of the run's latest evaluation. Raises UserError when it has none."""
    if (found := _newest(workdir)) is None:
        raise UserError(f"{workdir} has no evaluation; make one with: deperceiver eval --workdir={workdir}.")
    return found


def _newest(workdir: Path) -> Path | None:
    done = [path.parent for path in (workdir / "eval").glob("*/metrics.json")]
    return max(done, key=lambda path: (path.name.isdigit() and int(path.name), path.name), default=None)


def check_evaluated(workdir: Path, data: Fingerprint) -> None:
    """Raises UserError when the run in `workdir` is known to have evaluated other data than `data` before."""
    newest = _newest(workdir)
    before = None if newest is None else evaluated_data(newest)
    if before is not None and before != data:
        told, other = tell_apart(before, data)
        raise UserError(
            f"The evaluation split is not what {workdir} was evaluated on: {told} then, {other} now. Take another "
            "--workdir, or go on all the same with --config.data.allow_changed=True."
        )


def evaluated_data(evaluation: Path) -> Fingerprint | None:
    """By which the evaluated data are known again; None for an evaluation of before 0.2.5, or none at all."""
    return read_json(evaluation / DATA) if (evaluation / DATA).is_file() else None


def require_evaluated(evaluation: Path, source: "Source") -> None:
    """Raises UserError where an evaluation is known to be of other data than `source`."""
    before, now = evaluated_data(evaluation), data_fingerprint(source)
    if before not in (None, now):
        told, other = tell_apart(before, now)
        raise UserError(f"{evaluation} is an evaluation of other data: {told} there, {other} here.")


def read_json(file: Path) -> Any:
    """What an evaluation wrote. Raises UserError for a file that is not there, or was cut or overwritten."""
    try:
        return orjson.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not what an evaluation wrote ({error}); run eval.py again.") from error

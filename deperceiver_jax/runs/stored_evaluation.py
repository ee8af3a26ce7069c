"""What evaluations have written into a workdir."""

from pathlib import Path
from typing import Any

import orjson

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import reason


def newest_evaluation(workdir: Path) -> Path:
    """The directory of the run's latest evaluation. Raises UserError when it has none."""
    done = [path.parent for path in (workdir / "eval").glob("*/metrics.json")]
    if not done:
        raise UserError(f"{workdir} has no evaluation; make one with: deperceiver eval --workdir={workdir}.")
    return max(done, key=lambda path: (path.name.isdigit() and int(path.name), path.name))


def read_json(file: Path) -> Any:
    """What an evaluation wrote. Raises UserError for a file that is not there, or was cut or overwritten."""
    try:
        return orjson.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not what an evaluation wrote ({error}); run eval.py again.") from error

"""metrics.jsonl as it is found: lines of training and evaluation, and what a crash or a person has left among them."""

import json
from pathlib import Path
from typing import NamedTuple

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import reason


class MetricLines(NamedTuple):
    """The whole lines of a file; the rest behind the last line break, which a run may be writing, is left out."""

    rows: list[tuple[bytes, dict]]  # each line as it stands, and what it says
    garbage: list[int]  # numbers, from 1, of lines that are no JSON object with a step and a split


def read_metrics(path: Path) -> MetricLines:
    """Nothing where there is no file. Raises UserError for one that cannot be read."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricLines([], [])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    found = MetricLines([], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("split"), str):
            found.rows.append((line, row))
        else:
            found.garbage.append(number)
    return found

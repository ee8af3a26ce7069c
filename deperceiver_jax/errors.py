"""What a person can mend: one sentence that names the file and the item."""

import math
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input or setting. The command-line programs print its sentence to stderr and exit with status 1."""


def check_choice(field: str, value: object, choices: Iterable[object]) -> None:
    """Raises UserError unless `value`, which was set as `field`, is one of `choices`."""
    *others, last = choices
    if value != last and value not in others:
        listed = f"{', '.join(map(str, others))} or {last}" if others else str(last)
        raise UserError(f"{field} is {value!r}; it can be {listed}.")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raises UserError unless `value`, which was set as `field`, is a finite number of at least `least`."""
    if not least <= value < math.inf:
        raise UserError(f"{field} is {value}; it must be at least {least}.")


def check_between(field: str, value: float, least: float, most: float) -> None:
    """Raises UserError unless `value`, which was set as `field`, is a number from `least` to `most`."""
    if not least <= value <= most:
        raise UserError(f"{field} is {value}; it must be between {least} and {most}.")


def check_fraction(field: str, value: float) -> None:
    """Raises UserError unless `value`, which was set as `field`, is a number from 0 on, but below 1."""
    if not 0 <= value < 1:
        raise UserError(f"{field} is {value}; it must be at least 0 and below 1.")


def check_above_zero(field: str, value: float) -> None:
    """Raises UserError unless `value`, which was set as `field`, is a finite number above 0."""
    if not 0 < value < math.inf:
        raise UserError(f"{field} is {value}; it must be above 0.")

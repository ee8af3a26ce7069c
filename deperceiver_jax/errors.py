"""What a person can mend: one sentence that names the file and the item."""

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
    """Raises UserError unless `value`, which was set as `field`, is a number of at least `least`."""
    if not value >= least:
        raise UserError(f"{field} is {value}; it must be at least {least}.")

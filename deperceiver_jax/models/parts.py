"""Parts of a detector from their section of the config: a field that is missing or unknown gets a sentence."""

import inspect
from typing import Any

from deperceiver_jax.errors import UserError


def build_part(part: type, section: str, fields: dict[str, Any], **given) -> Any:
    """`part(**fields, **given)`. `fields` come from the config section `section`; `given` from the detector's code.

    Raises UserError where `fields` are not exactly the keyword arguments of `part` that are not given.
    """
    check_fields(part, section, fields, given)
    return part(**fields, **given)


def check_fields(part: type, section: str, fields: dict[str, Any], given: Any) -> None:
    """Raises UserError naming what is missing from or unknown to a config section; see build_part."""
    parameters = [p for p in inspect.signature(part.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    wanted = {p.name for p in parameters[1:]} - set(given)
    required = {p.name for p in parameters[1:] if p.default is p.empty} - set(given)
    if missing := sorted(required - set(fields)):
        raise UserError(f"{section} lacks {', '.join(missing)}, which {part.__name__} needs.")
    if unknown := sorted(set(fields) - wanted):
        raise UserError(f"{section} has {', '.join(unknown)}, which {part.__name__} does not know.")

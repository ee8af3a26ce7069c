"""Parts of a detector from their section of the config: a field that is missing or unknown gets a sentence."""

import inspect
from collections.abc import Mapping
from typing import Any

from deperceiver_jax.errors import UserError


def build_part(part: type, section: str, fields: Mapping[str, Any], *given, **named) -> Any:
    """`part(*given, **fields, **named)`. `fields` come from the config section `section`, the rest from code.

    Raises UserError where `fields` are not exactly the keyword arguments of `part` that are not given.
    """
    parameters = [p for p in inspect.signature(part.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p for p in parameters[1 + len(given) :] if p.name not in named]
    if missing := sorted({p.name for p in parameters if p.default is p.empty} - set(fields)):
        raise UserError(f"{section} lacks {', '.join(missing)}.")
    if unknown := sorted(set(fields) - {p.name for p in parameters}):
        raise UserError(f"{section} has {', '.join(unknown)}, which does not exist there.")
    return part(*given, **fields, **named)

"""Parts of a detector from their section of the config: a field that is missing or unknown gets a sentence."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from deperceiver_jax.errors import UserError

T = TypeVar("T")


def build_part(part: type[T], section: str, fields: Mapping[str, Any], *given, **named) -> T:
    """`part(*given, **fields, **named)`. `fields` come from the config section `section`, the rest from code.

    Raises UserError where `fields` are not exactly the keyword arguments of `part` that are not given.
    """
    initializer = part.__init__  # type: ignore[misc]  # the class itself has the signature of nnx's metaclass
    parameters = [p for p in inspect.signature(initializer).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p for p in parameters[1 + len(given) :] if p.name not in named]
    if missing := sorted({p.name for p in parameters if p.default is p.empty} - set(fields)):
        raise UserError(f"{section} lacks {', '.join(missing)}.")
    if unknown := sorted(set(fields) - {p.name for p in parameters}):
        raise UserError(f"{section} has {', '.join(unknown)}, which does not exist there.")
    return part(*given, **fields, **named)

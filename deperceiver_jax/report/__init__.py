"""The report of an evaluation: one HTML file that needs no network."""

import importlib.util

from deperceiver_jax.errors import UserError


def require_libraries(what: str) -> None:
    """Raises UserError when a library is missing without which `what` cannot draw; they are large, and an extra."""
    missing = [name for name in ("altair", "jinja2", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install '.[report]'.")

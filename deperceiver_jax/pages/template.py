"""A page as one HTML text, with all that is needed to show it."""

from pathlib import Path

import jinja2
import orjson

ROOM = Path(__file__).parent


def render(room: Path, title: str, *, styles: tuple[Path, ...] = (), scripts: tuple[str, ...] = (), **values) -> str:
    """page.html of a room, which extends base.html; `fill` puts the page's data into it.

    styles: files behind style.css. scripts: their texts, in order. `share` shows a number of [0, 1] in the page, and a
    dash where it is not defined.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([room, ROOM]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["share"] = lambda value: "–" if value is None or value < 0 else f"{value:.3f}"
    style = "".join(path.read_text() for path in (ROOM / "style.css", *styles))
    return environment.get_template("page.html").render(title=title, style=style, scripts=scripts, **values)


def fill(page: str, data: object) -> str:
    """The rendered page with its data."""
    return page.replace("@DATA@", as_json(data), 1)


def as_json(content: object) -> str:
    """As a script element may hold it, whatever the names in it are."""
    return orjson.dumps(content).decode().replace("<", "\\u003c")

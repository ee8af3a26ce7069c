"""Fonts that have the letters of a text: Pillow's own for plain English, else the first installed one that has all.

Pillow's has little beyond ASCII, and what a font lacks it draws as an empty square, which nobody can read.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import ImageFont

from deperceiver_jax.data import ClassMap

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PROBE_SIZE = 16
_NO_LETTER = "\U0010ffff"  # a code point that no script has: what a font draws for what it lacks
_WIDE = ("notosanscjk", "dejavusans.", "notosans-regular", "arialunicode", "arial unicode", "noto", "dejavu")


def font_for(text: str, size: float) -> Font:
    """A font with every letter of `text`, or Pillow's own where none is installed."""
    path = next((path for path in (None, *installed_fonts()) if all(has_letter(path, x) for x in set(text))), None)
    return _load(path, size)


def fitting(text: str, size: int, width: int) -> Font:
    """The font at `size`, or as much smaller as the text needs."""
    length = font_for(text, size).getlength(text)
    return font_for(text, size if length <= width else max(8, size * width / length))


@functools.lru_cache(64)
def _load(path, size):
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def readable(classes: ClassMap) -> Callable[[int], str]:
    """Class slot -> what to draw: its name, or its category id where no font has the name's letters; warns of those."""
    fonts = (None, *installed_fonts())
    ids = {
        slot: str(category)
        for slot, category, name in zip(classes.slots, classes.category_ids, classes.names, strict=True)
        if not any(all(has_letter(path, letter) for letter in set(name)) for path in fonts)
    }
    if ids:
        print(
            f"warning: No installed font has all letters of {len(ids)} class names (the first is "
            f"{classes.name(next(iter(ids)))}); their category ids are drawn. A font such as Noto Sans CJK would have "
            "most.",
            file=sys.stderr,
            flush=True,
        )
    return lambda slot: ids.get(slot, classes.name(slot))


@functools.cache
def installed_fonts() -> tuple[str, ...]:
    """Font files in the system's and the user's folders, those with many scripts first."""
    home = Path.home() if "HOME" in os.environ or os.name == "nt" else Path("/")
    shared = os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":")
    places = [home / ".local/share/fonts", home / ".fonts", *(Path(place) / "fonts" for place in shared)]
    places += [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    places.append(Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts")
    found = [
        os.path.join(folder, name)
        for place in places
        for folder, _, names in os.walk(place)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
    ]

    def rank(path):
        name = os.path.basename(path).lower()
        return next((k for k, start in enumerate(_WIDE) if name.startswith(start)), len(_WIDE)), name

    return tuple(sorted(found, key=rank))


@functools.cache
def has_letter(path: str | None, letter: str) -> bool:
    """Whether a font file, None for Pillow's own, draws something of its own for a letter."""
    probe = _probe(path)
    if probe is None:
        return False
    font, nothing = probe
    return letter.isspace() or bytes(font.getmask(letter)) != nothing


@functools.cache
def _probe(path):
    """(font, the square that it draws for what it lacks), None for a file that gives no font of this size."""
    try:
        font = _load(path, _PROBE_SIZE)
        return font, bytes(font.getmask(_NO_LETTER))
    except (OSError, ValueError):  # broken, or bitmaps of other sizes
        return None

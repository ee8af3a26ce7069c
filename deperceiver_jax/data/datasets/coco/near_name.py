"""What a file that is not there might be called instead: names that were written on another system, or moved."""

import os
import unicodedata
from collections.abc import Callable

FORMS: dict[str, Callable[[str], str]] = {  # what does not count, in words: a name without it
    "upper and lower case": str.casefold,
    "the Unicode form of its letters": lambda name: unicodedata.normalize("NFC", name),
    "its slashes": lambda name: name.replace("\\", "/"),
    "its folder": os.path.basename,
}


def near_name(directory: str, name: str) -> str:
    """In words, to stand behind the name: the file in `directory` that differs in as little as can be; or nothing."""
    files = [
        os.path.relpath(os.path.join(folder, file), directory)
        for folder, _, names in os.walk(directory)
        for file in sorted(names)
    ]
    for what, form in (FORMS | {"its spelling": _plain}).items():
        for file in files:
            if form(file) == form(name):
                return f" (there is {file}, which differs in {what})"
    return ""


def _plain(name):
    return os.path.basename(unicodedata.normalize("NFC", name).replace("\\", "/").casefold())

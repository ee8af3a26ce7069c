"""What a layout is: how a folder's files make splits."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from deperceiver_jax.data.datasets.listing import SplitFiles
from deperceiver_jax.errors import UserError

SPLITS = ("train", "validation", "test")
FIELDS = {"train": "train", "validation": "val"}  # split -> how config.data calls its files
_WORDS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), SPLITS[1]
)


class Layout(NamedTuple):
    """A layout that a folder has."""

    name: str  # as config.data.layout calls it
    whose: str  # in words
    found: str  # by what it was recognised, in words
    splits: Mapping[str, Callable[[], SplitFiles]]  # each is looked at when it is asked for; raises UserError


def split_of(name: str) -> str | None:
    """The split that the name of a file or folder has, as instances_train2017 has train; None for none or several."""
    words = re.findall("[a-z]+", name.lower())
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 and "dev" not in words else None


def split_share(names: list[str], split: str, data: ConfigDict) -> list[str]:
    """Those of `names` that fall to train or validation. A name's place depends on it and config.data.split_seed alone.

    So pictures that are added later leave almost all others where they are. Raises UserError where a split gets none.
    """
    if len(names) < 2:
        raise UserError(f"{data.directory} has {len(names)} pictures, which cannot be divided into two splits.")
    count = min(max(1, round(data.val_share * len(names))), len(names) - 1)
    validation = set(
        sorted(names, key=lambda name: hashlib.sha256(f"{data.split_seed} {name}".encode()).digest())[:count]
    )
    return [name for name in names if (name in validation) == (split == "validation")]

"""Class slot <-> the data set's category id <-> name.

A class slot is the position of a class among a detector's logits. COCO keeps its 91 category ids as slots (80 of them
used), so that published checkpoints load unchanged; any other data set gets contiguous slots by ascending category id.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from deperceiver_jax.errors import UserError

COCO_SLOTS = 91
COCO_CATEGORIES = dict(
    zip(
        [slot for slot in range(1, 91) if slot not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)],
        (
            "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
            "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
            "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
            "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
            "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
            "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
            "toothbrush"
        ).split(","),
        strict=True,
    )
)


@dataclass(frozen=True)
class ClassMap:
    """The classes of a data set in ascending order of slot. Equal maps give a detector's logits the same meaning."""

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    slots: tuple[int, ...]
    num_slots: int

    @classmethod
    def from_categories(cls, categories: Iterable[tuple[int, str]]) -> "ClassMap":
        """The map of a data set that lists these (id, name); COCO's own slots if all of them are COCO's."""
        ordered = sorted((int(id), str(name)) for id, name in categories)
        ids, names = tuple(id for id, _ in ordered), tuple(name for _, name in ordered)
        if all(COCO_CATEGORIES.get(id) == name for id, name in ordered):
            return cls(ids, names, ids, COCO_SLOTS)
        return cls(ids, names, tuple(range(len(ids))), len(ids))

    def to_json(self) -> str:
        """The text of classes.json."""
        rows = zip(self.slots, self.category_ids, self.names, strict=True)
        classes = [{"slot": slot, "category_id": id, "name": name} for slot, id, name in rows]
        return json.dumps({"num_slots": self.num_slots, "classes": classes}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ClassMap":
        """The map that `to_json` wrote."""
        stored = json.loads(text)
        ids, names, slots = (tuple(row[key] for row in stored["classes"]) for key in ("category_id", "name", "slot"))
        return cls(ids, names, slots, stored["num_slots"])

    def category_to_slot(self, category_ids: Int[np.ndarray, "*axes"]) -> Int[np.ndarray, "*axes"]:
        """Category ids, all of them listed -> class slots."""
        order = np.searchsorted(self.category_ids, category_ids)
        return np.asarray(self.slots, np.int32)[order]

    def name(self, slot: int) -> str:
        """The class's name; an unused slot of COCO is called by its number."""
        return self.names[self.slots.index(slot)] if slot in self.slots else f"unused {slot}"


def require_same_classes(expected: ClassMap, expected_of: str, found: ClassMap, found_of: str) -> None:
    """Refuses two class maps that differ, naming the first class that does."""
    if expected == found:
        return
    ours = set(zip(expected.slots, expected.category_ids, expected.names, strict=True))
    theirs = set(zip(found.slots, found.category_ids, found.names, strict=True))
    slot, category, name = min(ours ^ theirs)
    owner, other = (expected_of, found_of) if (slot, category, name) in ours else (found_of, expected_of)
    raise UserError(
        f"The classes of {expected_of} and {found_of} differ: {owner} has category {category} ({name!r}) "
        f"in slot {slot}, {other} has not."
    )

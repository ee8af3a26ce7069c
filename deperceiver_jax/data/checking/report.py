"""What was found in a folder, as text."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from deperceiver_jax.data.checking.check import Checked, same_within_and_across
from deperceiver_jax.data.checking.unprepared import Split, doubled_boxes
from deperceiver_jax.data.datasets.source import odd_boxes

_LABEL, _COLUMN = 46, 14
_CLASSES = 100  # that are listed at most
_RARE = 10  # boxes of a class; hotcoco's bound, too
_SMALL, _LARGE = 32**2, 96**2  # pixels; COCO's bounds between small, medium and large


def report(checked: Checked) -> list[str]:
    """Lines: what the splits have, their classes, and what is worth a look. Problems are not among them."""
    splits = checked.splits
    lines = [f"{checked.root} is in {checked.layout.whose} layout ({checked.layout.found})."]
    if not splits:
        return lines
    within, across = same_within_and_across(checked)
    lines += ["", _row("", splits)]
    for label, value, always in _facts(within):
        cells = [value(name, split) for name, split in splits.items()]
        if always or any(cell != "0" for cell in cells):
            lines.append(_row(label, cells))
    return [*lines, "", *_classes(splits), *_worth_a_look(checked, across)]


def _row(label, cells):
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _facts(within) -> list[tuple[str, Callable[[str, Split], str], bool]]:
    """(label, split -> value, whether it is shown when all are 0)."""

    def odd(words):
        return lambda name, split: f"{odd_boxes(split.index)[words].sum()}"

    def targets(split):
        return np.bincount(split.source.all_targets()[0], minlength=len(split.source))

    return [
        ("pictures", lambda name, split: f"{len(split.source)}", True),
        ("  without a box to learn", lambda name, split: f"{(targets(split) == 0).sum()}", True),
        ("  missing or broken", lambda name, split: f"{len(split.broken)}", True),
        ("  of the same content as another of the split", lambda name, split: f"{within[name]}", True),
        ("  turned, as EXIF says", lambda name, split: f"{(split.index.orientation != 1).sum()}", False),
        ("  of another size than annotated", lambda name, split: f"{len(split.resized)}", False),
        ("  of another kind than their name says", lambda name, split: f"{len(split.misnamed)}", False),
        ("  MB", lambda name, split: f"{split.num_bytes / 1e6:.1f}", True),
        ("  width x height, smallest", lambda name, split: _size(split, np.argmin), True),
        ("  width x height, commonest", _commonest, True),
        ("  width x height, largest", lambda name, split: _size(split, np.argmax), True),
        ("boxes to learn", lambda name, split: f"{targets(split).sum()}", True),
        ("  of the fullest picture", lambda name, split: f"{targets(split).max()}", True),
        ("  side in pixels, least tenth", lambda name, split: _side(split, 10), True),
        ("  side in pixels, median", lambda name, split: _side(split, 50), True),
        ("  side in pixels, largest tenth", lambda name, split: _side(split, 90), True),
        ("  small, medium, large (32, 96 pixels) in %", _shares, True),
        ("crowds, left out of training", lambda name, split: f"{split.index.is_crowd.sum()}", False),
        ("boxes clipped at the border", odd("reach outside their image and are clipped"), False),
        ("boxes empty inside the picture, left out", odd("are empty inside their image and are left out"), False),
        ("boxes smaller than a pixel", odd("are smaller than a pixel"), False),
        ("boxes that are not finite, left out", lambda name, split: f"{split.index.non_finite}", False),
        ("boxes that are there twice", lambda name, split: f"{doubled_boxes(split.index)}", False),
    ]


def _size(split, which):
    height, width = split.source.sizes[which(split.source.sizes.prod(axis=1, dtype=np.int64))]
    return f"{width} x {height}"


def _commonest(name, split):
    sizes, counts = np.unique(split.source.sizes, axis=0, return_counts=True)
    height, width = sizes[counts.argmax()]
    return f"{width} x {height}"


def box_sides(split: Split) -> np.ndarray:
    """Square roots of the areas of all targets, in pixels of their pictures."""
    boxes = split.source.all_targets()[1].astype(np.float64)
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _side(split, percent):
    sides = box_sides(split)
    return f"{np.percentile(sides, percent):.1f}" if len(sides) else "-"


def _shares(name, split):
    areas = box_sides(split) ** 2
    if not len(areas):
        return "-"
    small, large = (areas < _SMALL).mean() * 100, (areas >= _LARGE).mean() * 100
    return f"{small:.0f}, {100 - small - large:.0f}, {large:.0f}"


def _classes(splits):
    """A table of classes: boxes of each split, and pictures of the first one."""
    lines = [_row("class (boxes, pictures)", splits)]
    counts = {name: _count(split) for name, split in splits.items()}
    classes = dict.fromkeys(each for of_split in counts.values() for each in of_split)
    rows = [(each, [counts[split].get(each, (0, 0)) for split in splits]) for each in classes]
    rows.sort(key=lambda row: -row[1][0][0])
    for (id, name), cells in rows[:_CLASSES]:
        label = f"{name} ({id})" if name in _names_of_several(classes) else name
        lines.append(_row(label[: _LABEL - 1], [f"{boxes}, {pictures}" for boxes, pictures in cells]))
    if len(rows) > _CLASSES:
        lines.append(f"and {len(rows) - _CLASSES} more, of at most {rows[_CLASSES][1][0][0]} boxes each")
    return lines


def _names_of_several(classes):
    """{name: number} of those that several categories (id, name) have."""
    numbers = Counter(name for _, name in classes)
    return {name: number for name, number in numbers.items() if number > 1}


def _count(split):
    """{(category's id, its name): (boxes, pictures)}."""
    classes = split.source.classes
    image, _, labels = split.source.all_targets()
    boxes = np.bincount(labels, minlength=classes.num_slots)
    pictures = np.bincount(np.unique(np.column_stack([labels, image]), axis=0)[:, 0], minlength=classes.num_slots)
    known = zip(classes.slots, classes.category_ids, classes.names, strict=True)
    return {(id, name): (int(boxes[slot]), int(pictures[slot])) for slot, id, name in known}


def _worth_a_look(checked, across):
    found = [*checked.remarks]
    found += [f"{split}: {note}." for split, known in checked.splits.items() for note in known.notes]
    for split, known in checked.splits.items():
        for names, words in ((known.resized, "of another size than annotated"), (known.misnamed, "of another kind")):
            if names:
                found.append(f"{split}: {names[0]} is the first picture {words}.")
    for group in [group for group in checked.same if len({split for split, _ in group}) == 1][:3]:
        found.append(f"{' = '.join(name for _, name in group[:4])} have the same content.")
    if across:
        first = " = ".join(f"{split} {name}" for split, name in across[0][:4])
        found.append(f"{len(across)} pictures are in several splits, so that metrics flatter; the first is {first}.")
    if checked.unlisted:
        found.append(f"{len(checked.unlisted)} pictures are listed nowhere; the first is {checked.unlisted[0]}.")
    if checked.odd:
        found.append(f"{len(checked.odd)} other files are among them; the first is {checked.odd[0]}.")
    for split, known in checked.splits.items():
        clipped = int(odd_boxes(known.index)["reach outside their image and are clipped"].sum())
        if 2 * clipped > len(known.source.all_targets()[0]) > 0:
            found.append(
                f"{split}: {clipped} boxes reach over the border: are they left, top, right and bottom? They are to be "
                "left, top, width and height."
            )
    counted = {split: _count(known) for split, known in checked.splits.items()}
    several = _names_of_several(dict.fromkeys(each for of_split in counted.values() for each in of_split))
    found += [f"{number} categories are called {name!r}." for name, number in several.items()]
    if "train" in counted:
        unseen = [name for (_, name), (boxes, _) in counted["train"].items() if not boxes]
        if unseen:
            found.append(f"{len(unseen)} classes have no box in train; the first is {unseen[0]!r}.")
        if rare := sum(0 < boxes < _RARE for boxes, _ in counted["train"].values()):
            found.append(f"{rare} classes have fewer than {_RARE} boxes in train.")
    return ["", "Worth a look", *(f"- {line}" for line in found)] if found else []

"""YOLO's layout: data.yaml names the classes and the folders of pictures, and each picture has a text file of boxes."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from deperceiver_jax.data.datasets.layouts.layout import Layout, split_of
from deperceiver_jax.data.datasets.listing import Listing, SplitFiles, columns, file_state
from deperceiver_jax.data.image_header import PICTURE_ENDINGS
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import walk

MOST = 1.1  # a share of the picture is at most, by rounding and by boxes beyond the border


def yolo(root: Path, data: ConfigDict) -> Layout | None:
    """A .yaml file with `names` and at least one of `train` and `val`."""
    described = {file: content for file in sorted(root.glob("*.y*ml")) if (content := _read_yaml(file)) is not None}
    if len(described) > 1:
        first, second, *_ = described
        raise UserError(f"{root} has two files that describe YOLO's data, {first.name} and {second.name}; one must go.")
    for file, content in described.items():
        names = _class_names(file, content)
        places = {split: place for key, place in content.items() if (split := split_of(str(key))) and place}
        splits = {
            split: functools.partial(_split_files, root, file, content, split, place, names)
            for split, place in places.items()
        }
        return Layout("yolo", "YOLO's", file.name, splits)
    return None


def _read_yaml(file: Path) -> dict[str, Any] | None:
    """The content of a file that describes YOLO's data; None for another one, but UserError for a broken data.yaml."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if file.stem != "data":
            return None
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or "names" not in content or not {"train", "val"} & content.keys():
        return None
    return content


def _class_names(file, content):
    names = content["names"]
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: names is {names!r}, neither a list nor numbers from 0 on with their names.")
    return [str(name) for name in names]


def _split_files(root, file, content, split, places, names):
    pictures = []
    for place in places if isinstance(places, list) else [places]:
        pictures += _pictures(root, _find(root, file, content, str(place), split))
    pictures = sorted(set(pictures))
    if not pictures:
        raise UserError(f"{file}: its split {split}, {places}, has no picture.")
    labels = [_label_file(root, picture) for picture in pictures]
    state = [names, "kpt_shape" in content, [file_state(label) for label in labels]]
    read = functools.partial(_read, root, file, pictures, labels, names, "kpt_shape" in content)
    return SplitFiles(f"{file}, {split}", root, [_relative(picture, root) for picture in pictures], state, read)


def _find(root, file, content, place, split):
    """Where a split's pictures are: the file may have been written for another computer or another current folder."""
    base = root / str(content.get("path") or "")
    inner = place.replace("\\", "/")
    while inner.startswith("../"):
        inner = inner[3:]
    tried = [base / place, root / place, root / inner]
    found = next((place for place in tried if place.exists()), None)
    if found is None:
        raise UserError(
            f"{file}: split {split} is {place}, and there is no {' or '.join(dict.fromkeys(map(str, tried)))}."
        )
    return Path(os.path.normpath(found))


def _pictures(root, place):
    if place.is_file():  # a list of pictures, from where it is or from the root
        listed = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        found = [
            next((base / line for base in (place.parent, root) if (base / line).exists()), line) for line in listed
        ]
        return [Path(os.path.normpath(root / picture)) for picture in found]
    return [
        Path(folder, name) for folder, files in walk(place) for name in files if name.lower().endswith(PICTURE_ENDINGS)
    ]


def _label_file(root, picture):
    """In `labels` where the picture is in a folder `images` of the data set, or else beside it."""
    parts = list(picture.parts)
    inside = len(root.parts) if picture.is_relative_to(root) else 0
    places = [place for place, part in enumerate(parts[:-1]) if part == "images" and place >= inside]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _relative(picture, root):
    return os.fspath(picture.relative_to(root) if picture.is_relative_to(root) else picture)


def _read(root, file, pictures, labels, names, poses) -> Listing:
    rows, count = [], 0
    for label in labels:
        rows.append(
            [
                (box, category, False, box[2] * box[3], count + k + 1)
                for k, (category, box) in _boxes(label, names, poses)
            ]
        )
        count += len(rows[-1])
    without = [_relative(picture, root) for picture, file in zip(pictures, labels, strict=True) if not file.is_file()]
    notes = []
    if 0 < len(without) < len(pictures):  # of a test split, none may have one
        notes.append(f"{len(without)} pictures have no label file, and so no box (the first is {without[0]})")
    if spare := _without_picture(labels):
        notes.append(f"{len(spare)} label files have no picture (the first is {_relative(spare[0], root)})")
    return Listing(
        categories=list(enumerate(names)),
        image_ids=list(range(1, len(pictures) + 1)),
        filenames=[_relative(picture, root) for picture in pictures],
        stated_sizes=[None] * len(pictures),
        annotations=[columns(boxes) for boxes in rows],
        notes=notes,
        boxes_are_shares=True,
    )


def _without_picture(labels):
    """Text files beside the labels, in folders called so, that belong to no picture."""
    folders = sorted({label.parent for label in labels if "labels" in label.parts})
    there = [file for folder in folders for file in sorted(folder.glob("*.txt")) if file.name != "classes.txt"]
    return sorted(set(there) - set(labels))


def _boxes(file, names, poses):
    """(number, (class, xywh box in shares of the picture)) of each line, which may have an outline's points instead.

    poses: lines have the points of a pose behind the box, which are passed over.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text: {error}.") from error
    for k, line in enumerate(line for line in enumerate(lines, 1) if line[1].strip()):
        number, text = line
        try:
            category, *shares = map(float, text.split())
        except ValueError:
            raise UserError(f"{file}, line {number}: {text.strip()!r} are not numbers.") from None
        if category not in range(len(names)):
            raise UserError(f"{file}, line {number}: class {text.split()[0]} is none of the {len(names)} from 0 on.")
        if poses:
            shares = shares[:4]
        if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
            raise UserError(
                f"{file}, line {number}: {len(shares)} numbers follow the class; a box has 4 (centre x, centre y, "
                "width, height), an outline two for each of its points."
            )
        wrong = next((share for share in shares if not (math.isfinite(share) and 1 - MOST <= share <= MOST)), None)
        if wrong is not None:
            raise UserError(f"{file}, line {number}: {wrong:g} is no share of the picture; YOLO's go from 0 to 1.")
        if len(shares) == 4:
            x, y, width, height = shares
            box = x - width / 2, y - height / 2, width, height
        else:
            low, high = (min(shares[::2]), min(shares[1::2])), (max(shares[::2]), max(shares[1::2]))
            box = *low, high[0] - low[0], high[1] - low[1]
        yield k, (int(category), box)

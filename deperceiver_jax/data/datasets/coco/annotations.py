"""Reads a COCO annotation file into flat arrays, and refuses one that is not COCO, naming the item."""

import json
import math
from pathlib import Path
from typing import Any

from deperceiver_jax.data.datasets.listing import Listing, columns
from deperceiver_jax.errors import UserError


def read_coco(path: Path) -> Listing:
    """Reads and checks `path`. Boxes of any extent pass, be they empty, outside or not finite; see data/index.py.

    A file without the list `annotations`, as COCO's test splits have it, is one of pictures without annotations.
    """
    return parse_coco(path, load_json(path))


def parse_coco(path: Path, content: dict[str, Any]) -> Listing:
    """What `load_json` read of `path`, checked."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key, [] if key == "annotations" else None), list):
            raise UserError(f"{path} is not COCO: it has no list called {key!r}.")
        if key != "annotations" and not content[key]:
            raise UserError(f"{path} is not usable: its list {key!r} is empty.")
    names = _categories(path, content["categories"])
    images = _images(path, content["images"])
    rows, without_area = _rows(path, content.get("annotations", []), names, images)
    ordered = sorted(images)
    return Listing(
        categories=sorted(names.items()),
        image_ids=ordered,
        filenames=[images[id][0] for id in ordered],
        stated_sizes=[images[id][1] for id in ordered],
        annotations=[columns(rows.get(id, [])) for id in ordered],
        notes=[f"{without_area} annotations had no area and got their box's"] if without_area else [],
    )


def load_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, with or without a byte order mark. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not COCO: it is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not COCO: it holds a {type(content).__name__}, not an object.")
    return content


def _categories(path, items):
    names = {}
    for item, place in _objects(path, "categories", items):
        id, name = _integer(path, place, item, "id"), _text(path, place, item, "name")
        if id in names:
            raise UserError(f"{path}: category id {id} is there twice ({names[id]!r} and {name!r}).")
        names[id] = name
    return names


def _images(path, items):
    images = {}
    for item, place in _objects(path, "images", items):
        id, filename = _integer(path, place, item, "id"), _text(path, place, item, "file_name")
        if id in images:
            raise UserError(f"{path}: image id {id} is there twice ({images[id][0]} and {filename}).")
        height, width = item.get("height"), item.get("width")
        stated = isinstance(height, int) and isinstance(width, int)
        images[id] = filename, (height, width) if stated else None
    return images


def _rows(path, items, names, images):
    """{image id: [(box, category_id, is_crowd, area, id), ...]} and the number of annotations without an area."""
    rows, seen, without_area = {}, set(), 0
    for item, place in _objects(path, "annotations", items):
        id = _integer(path, place, item, "id")
        if id in seen:
            raise UserError(f"{path}: annotation id {id} is there twice.")
        seen.add(id)
        image_id, category_id = _integer(path, place, item, "image_id"), _integer(path, place, item, "category_id")
        if image_id not in images:
            raise UserError(f"{path}: annotation {id} is of image {image_id}, which the file does not list.")
        if category_id not in names:
            raise UserError(f"{path}: annotation {id} has category {category_id}, which the file does not list.")
        if item.get("iscrowd", 0) not in (0, 1):
            raise UserError(f"{path}: iscrowd of annotation {id} is {item['iscrowd']!r}; it may be 0 or 1.")
        box, area = _box(path, id, item), item.get("area")
        if not (_is_number(area) and math.isfinite(area)):
            without_area += 1
            area = box[2] * box[3]
        rows.setdefault(image_id, []).append((box, category_id, bool(item.get("iscrowd", 0)), float(area), id))
    return rows, without_area


def _objects(path, key, items):
    for position, item in enumerate(items):
        place = f"{key}[{position}]"
        if not isinstance(item, dict):
            raise UserError(f"{path} is not COCO: {place} is a {type(item).__name__}, not an object.")
        yield item, place


def _integer(path, place, item, key):
    value = _present(path, place, item, key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise UserError(f"{path} is not COCO: {key} of {place} is {value!r}, not an integer of 64 bits.")
    return value


def _text(path, place, item, key):
    value = _present(path, place, item, key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{path} is not COCO: {key} of {place} is {value!r}, not a text.")
    return value


def _box(path, id, item):
    box = _present(path, f"annotation {id}", item, "bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(number) for number in box)):
        raise UserError(f"{path} is not COCO: bbox of annotation {id} is {box!r}, not four numbers.")
    return tuple(float(number) for number in box)


def _is_number(value):
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _present(path, place, item, key):
    if key not in item:
        raise UserError(f"{path} is not COCO: {place} has no {key!r}.")
    return item[key]

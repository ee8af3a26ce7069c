"""Which layout a folder has."""

import os
from pathlib import Path

from ml_collections import ConfigDict

from deperceiver_jax.data.datasets.layouts.json_files import coco, one_file, roboflow
from deperceiver_jax.data.datasets.layouts.layout import FIELDS, Layout
from deperceiver_jax.data.datasets.layouts.voc import voc
from deperceiver_jax.data.datasets.layouts.yolo import yolo
from deperceiver_jax.data.datasets.listing import SplitFiles
from deperceiver_jax.errors import UserError, check_at_least, check_choice

LAYOUTS = {"coco": coco, "roboflow": roboflow, "one_file": one_file, "yolo": yolo, "voc": voc}
CHOICES = ("auto", *LAYOUTS)  # of config.data.layout
_LOOKED_FOR = (
    "annotations/instances_train*.json or train.json (COCO's), train/_annotations.coco.json (Roboflow's), a single "
    ".json file that lists pictures, data.yaml (YOLO's), Annotations and JPEGImages (Pascal VOC's)"
)


def find_layout(root: Path, data: ConfigDict) -> Layout:
    """The layout of a folder; `data` is config.data. Raises UserError for none and, unless config.data.layout decides,
    for several.

    A file that config.data names itself, by train_annotations for example, is one in COCO's layout.
    """
    check_choice("config.data.layout", data.layout, CHOICES)
    check_at_least("config.data.split_seed", data.split_seed, 0)
    if not 0 < data.val_share < 1:
        raise UserError(f"config.data.val_share is {data.val_share}; it must be above 0 and below 1.")
    named = any(data[f"{field}_{part}"] for field in FIELDS.values() for part in ("annotations", "images"))
    asked = "coco" if named and data.layout == "auto" else data.layout
    found = _layouts(root, data, LAYOUTS if asked == "auto" else [asked])
    if len(found) > 1:
        listed = " and ".join(f"{layout.whose} ({layout.found})" for layout in found)
        names = " or ".join(layout.name for layout in found)
        raise UserError(f"{root} has {len(found)} layouts at once, {listed}; config.data.layout={names} decides.")
    if not found:
        here = "no layout that is known" if asked == "auto" else f"not the layout {asked}"
        raise UserError(f"{root} has {here}: {_LOOKED_FOR} were looked for{_below(root, data)}.")
    return found[0]


def find_split(root: Path, data: ConfigDict, split: str) -> SplitFiles:
    """A split of the folder. Raises UserError."""
    layout = find_layout(root, data)
    if split in layout.splits:
        files = layout.splits[split]()
        _require_names(files)
        return files
    has = f"it has {' and '.join(layout.splits)}"
    remedy = {
        "coco": f"; config.data.{FIELDS.get(split, 'val')}_annotations can name a file, and "
        "config.data.layout=one_file divides the pictures of a single one",
    }
    raise UserError(
        f"{root} has no split {split}: it was read in {layout.whose} layout ({layout.found}), and {has}"
        f"{remedy.get(layout.name, '')}."
    )


def _require_names(files):
    """Refuses a picture whose name no text can have, and so no list of detections."""
    for name in files.names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            path = os.path.join(files.image_directory, name)
            if os.path.exists(path):
                raise UserError(f"The name of the image {path!r} is no UTF-8; it needs another one.")


def _layouts(root, data, names):
    return [layout for name in names if (layout := LAYOUTS[name](root, data)) is not None]


def _below(root, data):
    """In words, a folder inside that has a layout: archives often have one around their content."""
    for entry in sorted(entry.path for entry in os.scandir(root) if entry.is_dir()):
        try:
            inner = _layouts(Path(entry), data, LAYOUTS)
        except (UserError, OSError):
            continue
        if inner:
            return f"; {entry} has {inner[0].whose}"
    return ""

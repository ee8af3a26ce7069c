"""Pascal VOC's layout: an XML file a picture in Annotations, pictures in JPEGImages, splits in ImageSets/Main."""

import functools
import os
import re
from pathlib import Path

import hotcoco
from ml_collections import ConfigDict

from deperceiver_jax.data.datasets.layouts.layout import SPLITS, Layout, split_share
from deperceiver_jax.data.datasets.listing import Listing, SplitFiles, columns, file_state
from deperceiver_jax.data.image_header import PICTURE_ENDINGS
from deperceiver_jax.errors import UserError

_SETS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}  # in ImageSets/Main
_ALL = "trainval.txt"
_FLAG = re.compile(r"\s+(-1|0|1)$")


def voc(root: Path, data: ConfigDict) -> Layout | None:
    """Annotations/*.xml and JPEGImages. Without lists, config.data.val_share makes train and validation."""
    if not (root / "JPEGImages").is_dir() or not (root / "Annotations").is_dir():
        return None
    sets = root / "ImageSets" / "Main"
    splits = {
        split: functools.partial(_split_files, root, _listed(root, sets / name))
        for split, name in _SETS.items()
        if (sets / name).is_file()
    }
    if not {"train", "validation"} & splits.keys():
        for split in SPLITS[:2]:
            splits[split] = functools.partial(_share, root, sets / _ALL, split, data)
    return Layout("voc", "Pascal VOC's", "Annotations and JPEGImages", splits)


def _share(root, every, split, data):
    stems = (
        _listed(root, every) if every.is_file() else sorted(file.stem for file in (root / "Annotations").glob("*.xml"))
    )
    return _split_files(root, split_share(stems, split, data))


def _listed(root, file):
    """The pictures that a list names, one a line; a class's list has 1, 0 or -1 behind the name."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not any(_FLAG.search(line) for line in lines):
        return lines
    known = _by_stem(root / "JPEGImages").keys() | {
        os.path.splitext(name)[0] for name in os.listdir(root / "Annotations")
    }
    return [line if line in known else _FLAG.sub("", line) for line in lines]


def _split_files(root, stems):
    pictures = _by_stem(root / "JPEGImages")
    files = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    state = [[file.name, file_state(file)] for file in files]
    names = [pictures.get(stem, f"{stem}.jpg") for stem in stems]
    read = functools.partial(_read, root, stems, names)
    return SplitFiles(os.fspath(root), root / "JPEGImages", names, state, read)


def _by_stem(folder):
    """The pictures of a folder, without what annotation tools leave beside them."""
    names = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(PICTURE_ENDINGS)]
    return {os.path.splitext(name)[0]: name for name in names}


def _read(root: Path, stems: list[str], names: list[str]) -> Listing:
    """What hotcoco reads, by the names of the XML files: those inside them are often of another copy.

    Classes are in order of name, ids of pictures in order of the split's list. Difficult objects count as crowds, which
    are neither learned nor counted. VOC's first pixel is 1; where one begins at 0, all are taken to do so.
    """
    try:
        stored = hotcoco.COCO.from_voc(os.fspath(root)).dataset
    except (ValueError, OSError) as error:
        raise UserError(f"{root} is not Pascal VOC's: {str(error).rstrip('.')}.") from error
    files = sorted(name for name in os.listdir(root / "Annotations") if name.endswith(".xml"))  # as hotcoco has them
    order = [os.path.splitext(name)[0] for name in files]
    if len(order) != len(stored["images"]):
        raise UserError(f"{root}: {len(stored['images'])} of the {len(order)} XML files in Annotations could be read.")
    image_of = {stem: image for stem, image in zip(order, stored["images"], strict=True)}
    from_zero = any(min(item["bbox"][:2]) < 0 for item in stored["annotations"])
    rows: dict[int, list] = {}
    for item in stored["annotations"]:
        left, top, width, height = item["bbox"]  # hotcoco has taken 1 off the first corner
        box = (left + 1, top + 1, width - 1, height - 1) if from_zero else (left, top, width, height)
        row = box, item["category_id"], bool(item["iscrowd"]), box[2] * box[3], item["id"]
        rows.setdefault(item["image_id"], []).append(row)
    sizes = [(image_of[stem]["height"], image_of[stem]["width"]) if stem in image_of else (0, 0) for stem in stems]
    return Listing(
        categories=[(item["id"], item["name"]) for item in stored["categories"]],
        image_ids=list(range(1, len(stems) + 1)),
        filenames=names,
        stated_sizes=[size if all(size) else None for size in sizes],
        annotations=[columns(rows.get(image_of[stem]["id"], []) if stem in image_of else []) for stem in stems],
        notes=_notes(from_zero, [stem for stem in stems if stem not in image_of], len(stems)),
    )


def _notes(from_zero, without_file, count):
    notes = ["boxes begin at 0, and are taken to count pixels from there"] if from_zero else []
    if 0 < len(without_file) < count:  # of a test split, none may have one
        notes.append(f"{len(without_file)} pictures have no XML file, and so no box (the first is {without_file[0]})")
    return notes

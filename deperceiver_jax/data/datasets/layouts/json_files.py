"""Layouts whose annotations are COCO's JSON: COCO's own, Roboflow's export, and one file for all pictures."""

import functools
import hashlib
import json
import mmap
import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from deperceiver_jax.data.datasets.coco.annotations import load_json, parse_coco, read_coco
from deperceiver_jax.data.datasets.coco.near_name import near_name
from deperceiver_jax.data.datasets.layouts.layout import FIELDS, SPLITS, Layout, split_of, split_share
from deperceiver_jax.data.datasets.listing import Listing, SplitFiles
from deperceiver_jax.errors import UserError

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic")  # of COCO's annotation files
_TRIED = 50  # names by which the folder of the pictures is found
_ROBOFLOW = "_annotations.coco.json"


def coco(root: Path, data: ConfigDict) -> Layout | None:
    """A JSON file a split: the one that config.data names, or the one whose name has the split's word."""
    splits = {}
    for split in SPLITS:
        field = FIELDS.get(split)
        file = root / data[f"{field}_annotations"] if field and data[f"{field}_annotations"] else _named(root, split)
        if file is not None:
            folder = data[f"{field}_images"] if field else ""
            splits[split] = functools.partial(_split_files, root, file, split, folder)
    return Layout("coco", "COCO's", "an annotation file a split", splits) if splits else None


def roboflow(root: Path, data: ConfigDict) -> Layout | None:
    """A folder a split, with its pictures and _annotations.coco.json."""
    files = {split: file for file in sorted(root.glob(f"*/{_ROBOFLOW}")) if (split := split_of(file.parent.name))}
    splits = {split: functools.partial(_roboflow_files, files, split) for split in files}
    return Layout("roboflow", "Roboflow's COCO export", f"{_ROBOFLOW} in its folders", splits) if splits else None


def one_file(root: Path, data: ConfigDict) -> Layout | None:
    """One JSON file for all pictures, which are divided by config.data.val_share."""
    files = _coco_files(root)
    if len(files) != 1 or (data.layout != "one_file" and split_of(files[0].stem)):
        return None
    splits = {split: functools.partial(_share_of_file, root, files[0], split, data) for split in SPLITS[:2]}
    return Layout("one_file", "one annotation file", f"only {files[0].name}", splits)


def _named(root, split):
    files = [file for file in _coco_files(root) if split_of(file.stem) == split]
    files = [file for file in files if file.stem.startswith("instances_")] or files
    if len(files) > 1:
        raise UserError(
            f"{root} has {len(files)} annotation files of its split {split}, {files[0].name} and {files[1].name} among "
            f"them; config.data.{FIELDS.get(split, 'val')}_annotations can name one."
        )
    return files[0] if files else None


def _coco_files(root):
    """The JSON files of a folder and its folder `annotations` that list pictures as COCO does."""
    files = [*sorted(root.glob("*.json")), *sorted(root.glob("annotations/*.json"))]
    files = [file for file in files if file.is_file() and not file.name.startswith(_OTHER_TASKS)]
    return [file for file in files if file.name.startswith("instances_") or _lists_pictures(file)]


def _lists_pictures(file):
    if not file.stat().st_size:
        return False
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"images"') >= 0 and _FILE_NAME.search(content) is not None


def _split_files(root, file, split, folder=""):
    field = FIELDS.get(split, "val")
    if not file.is_file():
        raise UserError(f"Split {split} needs {file} (config.data.{field}_annotations), which is not there.")
    names, state = _names(file)
    if folder and not (root / folder).is_dir():
        raise UserError(f"Split {split} needs {root / folder} (config.data.{field}_images), which is not there.")
    directory = root / folder if folder else _image_directory(root, file, names, split)
    return SplitFiles(os.fspath(file), directory, names, state, functools.partial(read_coco, file))


def _names(file):
    """(file names, what tells the content from another). Names are picked out of the bytes, without parsing more."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    names = []
    for quoted in _FILE_NAME.findall(content):
        try:
            names.append(json.loads(quoted))
        except ValueError:  # no name, which reading the whole file will say
            continue
    return names, hashlib.sha256(content).hexdigest()


def _image_directory(root, file, names, split):
    """The folder, at most two levels below `root`, that has most of the pictures tried; the split's own comes first."""
    folders = [root, file.parent, *_folders(root), *(inner for outer in _folders(root) for inner in _folders(outer))]

    def rank(folder):
        parts = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
        words = {word for part in parts if (word := split_of(part))}
        return 0 if words == {split} else 2 if words else 1

    if not names:
        return root  # reading the whole file will say what is wrong with it
    tried = names[:: max(1, len(names) // _TRIED)]
    hits = {folder: sum(_is_file(folder, name) for name in tried) for folder in sorted(folders, key=rank)}
    best = max(hits, key=lambda folder: hits[folder])
    if not hits[best]:
        near = near_name(os.fspath(root), tried[0])
        raise UserError(
            f"No folder in {root} has the pictures that {file} lists, the first is {tried[0]}{near}; "
            f"config.data.{FIELDS.get(split, 'val')}_images can name their folder."
        )
    return best


def _is_file(folder, name):
    try:
        return os.path.isfile(os.path.join(folder, name))
    except ValueError:  # a name that no file can have
        return False


def _folders(place):
    return sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir())


def _roboflow_files(files, split):
    names, _ = _names(files[split])
    state = [_names(file)[1] for file in files.values()]  # the others say which categories are used
    read = functools.partial(_read_roboflow, files, split)
    return SplitFiles(os.fspath(files[split]), files[split].parent, names, state, read)


def _read_roboflow(files: dict[str, Path], split: str) -> Listing:
    """One split. A parent category, which groups the others and has no box in any split, is left out."""
    contents = {name: load_json(file) for name, file in files.items()}
    listing = parse_coco(files[split], contents[split])
    used, parents = set(), set()
    for content in contents.values():
        used |= {item.get("category_id") for item in content.get("annotations", []) if isinstance(item, dict)}
        parents |= {item.get("supercategory") for item in content.get("categories", []) if isinstance(item, dict)}
    kept = [(id, name) for id, name in listing.categories if id in used or name not in parents]
    return Listing(**{**vars(listing), "categories": kept or listing.categories})


def _share_of_file(root, file, split, data):
    whole = _split_files(root, file, split)
    mine = set(split_share(sorted(set(whole.names)), split, data))

    def read():
        listing = read_coco(file)
        return listing.take([k for k, name in enumerate(listing.filenames) if name in mine])

    names = [name for name in whole.names if name in mine]
    state = [whole.state, data.val_share, data.split_seed]
    return SplitFiles(whole.listed_by, whole.image_directory, names, state, read)

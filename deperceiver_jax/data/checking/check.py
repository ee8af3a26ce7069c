"""Everything that can be known of a folder before training on it, and what a run would stop with."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from deperceiver_jax.data.batches.loader import EvaluationBatches, TrainBatches
from deperceiver_jax.data.checking.duplicates import same_content
from deperceiver_jax.data.checking.unprepared import Split, read_split
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.data.datasets.coco.near_name import near_name
from deperceiver_jax.data.datasets.layouts.layout import SPLITS, Layout
from deperceiver_jax.data.datasets.layouts.recognise import find_layout, find_split
from deperceiver_jax.data.datasets.source import copied_splits, existing_directory
from deperceiver_jax.data.image_header import PICTURE_ENDINGS
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import walk

_LISTS = (".json", ".txt", ".xml", ".yaml", ".yml", ".md", ".cache")  # that lie beside pictures and are none


@dataclass
class Checked:
    """What was found in a folder. A picture is called (split, name)."""

    root: Path
    layout: Layout
    splits: dict[str, Split] = field(default_factory=dict)  # those that could be read
    problems: list[str] = field(default_factory=list)  # what a run would stop with, a sentence each
    remarks: list[str] = field(default_factory=list)  # the same of splits that a run does not read
    loads: bool = False  # the training split
    same: list[list[tuple[str, str]]] = field(default_factory=list)  # pictures of the same content
    unlisted: list[str] = field(default_factory=list)  # pictures in the folders that no split lists
    odd: list[str] = field(default_factory=list)  # other files there that are neither pictures nor lists


def check_directory(config_data: ConfigDict, *, decode: bool) -> Checked:
    """Looks at config.data.directory as a run would, and further: at all splits, and on after the first problem.

    decode: all pixels, too. Raises UserError for a folder without a layout, and for one that cannot be read.
    """
    try:
        return _check(config_data, decode)
    except OSError as error:
        raise UserError(f"{error.filename or config_data.directory} cannot be read: {error.strerror}.") from error


def _check(config_data, decode):
    root = existing_directory(config_data)
    if copied := copied_splits(root):
        raise UserError(f"{root} has {' and '.join(copied)} prepared; check looks at pictures before they are.")
    checked = Checked(root, find_layout(root, config_data))
    used, said = (config_data.train_split, config_data.eval_split), dict[str, list[str]]()
    for split in (*SPLITS, *used):
        if split in checked.splits or (split not in used and split not in checked.layout.splits):
            continue
        try:
            files = find_split(root, config_data, split)
            checked.splits[split] = read_split(files, config_data, split, decode=decode)
        except OSError as error:
            said[split] = [f"{error.filename or root} cannot be read: {error.strerror}."]
        except UserError as error:
            said[split] = [str(error)]
        else:
            said[split] = checked.splits[split].problems + _broken(checked.splits[split], split, config_data)
    checked.problems = [sentence for split in said for sentence in said[split] if split in used]
    checked.remarks = [sentence for split in said for sentence in said[split] if split not in used]
    _try_to_load(checked, config_data)
    _find_same(checked)
    _find_unlisted(checked)
    checked.problems = list(dict.fromkeys(checked.problems))
    return checked


def _broken(found, split, config_data):
    if not found.broken or config_data.skip_corrupt:
        return []
    name, why = next(iter(found.broken.items()))
    near = "" if found.path(name).exists() else near_name(os.fspath(found.files.image_directory), name)
    return [
        f"{len(found.broken)} of the {len(found.files.names)} images of split {split} cannot be used, the first is "
        f"{name}{near}: {why}; config.data.skip_corrupt=True passes over them."
    ]


def _try_to_load(checked, config_data):
    """Adds what the loader refuses."""
    train, evaluated = (checked.splits.get(config_data[f"{part}_split"]) for part in ("train", "eval"))

    def load():
        if train:
            TrainBatches(train.source, config_data, seed=0)
            checked.loads = True

    def evaluate():
        if evaluated:
            EvaluationBatches(evaluated.source, config_data, batch_size=1)
            if not evaluated.source.annotated:
                split = config_data.eval_split
                raise UserError(f"Split {split} of {checked.root} has no annotations to evaluate with.")

    def compare():
        if train and evaluated:
            classes = train.source.classes, config_data.train_split, evaluated.source.classes, config_data.eval_split
            require_same_classes(*classes)

    for attempt in (load, evaluate, compare):
        try:
            attempt()
        except UserError as error:
            checked.problems.append(str(error))


def _find_same(checked):
    of_path: dict[str, list[tuple[str, str]]] = {}
    for split, found in checked.splits.items():
        for name in found.source.filenames.tolist():
            of_path.setdefault(os.path.normpath(found.path(name)), []).append((split, name))
    several = [pictures for pictures in of_path.values() if len(pictures) > 1]  # one file that is listed twice
    groups = [[picture for path in paths for picture in of_path[path]] for paths in same_content(of_path)]
    grouped = {picture for group in groups for picture in group}
    checked.same = groups + [pictures for pictures in several if pictures[0] not in grouped]


def _find_unlisted(checked):
    listed = {os.path.normpath(found.path(name)) for found in checked.splits.values() for name in found.files.names}
    folders = {os.path.normpath(found.files.image_directory) for found in checked.splits.values()}
    for folder in sorted(folders):
        if any(folder != outer and Path(folder).is_relative_to(outer) for outer in folders):
            continue  # it is looked through with the outer one
        for place, names in walk(Path(folder)):
            for name in sorted(names):
                path = os.path.join(place, name)
                if path in listed:
                    continue
                if name.lower().endswith(PICTURE_ENDINGS):
                    checked.unlisted.append(path)
                elif not name.lower().endswith(_LISTS):
                    checked.odd.append(path)


def same_within_and_across(checked: Checked) -> tuple[Counter[str], list[list[tuple[str, str]]]]:
    """(pictures of each split that are there once more in it, groups that are in several splits)."""
    within: Counter[str] = Counter()
    for group in checked.same:
        for split, count in Counter(split for split, _ in group).items():
            within[split] += count - 1
    return within, [group for group in checked.same if len({split for split, _ in group}) > 1]

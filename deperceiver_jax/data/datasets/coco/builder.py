"""TFDS builder for a split of any directory in COCO's layout: an annotation file and a directory of images."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from deperceiver_jax.data.datasets.coco.annotations import read_coco
from deperceiver_jax.data.datasets.coco.near_name import near_name
from deperceiver_jax.data.datasets.ordered_builder import OrderedBuilder
from deperceiver_jax.data.datasets.record import STATED_SIZE, example, record_features
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size, is_swapped
from deperceiver_jax.errors import UserError

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(eq=False)
class CocoConfig(tfds.core.BuilderConfig):
    """Which files make the split. The name, made of what they are, tells prepared data sets apart.

    image_bytes: what the images take on the disk, and will take again when they are prepared.
    """

    annotation_file: str = ""
    image_directory: str = ""
    split: str = ""
    skip_corrupt: bool = False
    image_bytes: int = 0


def coco_config(annotation_file: Path, image_directory: Path, split: str, skip_corrupt: bool) -> CocoConfig:
    """The config of a split, named after its annotation file's content and its images' place, sizes and times.

    So a picture that is changed, turned, added or deleted makes another data set. Names are picked out of the file's
    bytes and looked up, without parsing or reading more: two seconds for COCO's 118 000 on a disk of this machine.
    Raises UserError for a file that cannot be read.
    """
    try:
        content = annotation_file.read_bytes()
    except OSError as error:
        raise UserError(f"{annotation_file} cannot be read: {error.strerror}.") from error
    states = [_state(image_directory, name) for name in _FILE_NAME.findall(content)]
    place = os.fspath(image_directory.resolve())
    identity = json.dumps([hashlib.sha256(content).hexdigest(), place, split, bool(skip_corrupt), states])
    return CocoConfig(
        name=f"{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        description=f"{annotation_file} with {image_directory}",
        annotation_file=os.fspath(annotation_file),
        image_directory=os.fspath(image_directory),
        split=split,
        skip_corrupt=skip_corrupt,
        image_bytes=sum(state[0] for state in states if state),
    )


def _state(directory, quoted_name):
    """(size, time of the last change in nanoseconds) of a file, None where there is none of this name."""
    try:
        found = os.stat(os.path.join(directory, json.loads(quoted_name)))
    except (OSError, ValueError):  # nothing there, or nothing that could be a name, which preparing will say
        return None
    return found.st_size, found.st_mtime_ns


class CocoDirectory(OrderedBuilder):
    """Every image that the annotation file lists, in ascending order of id, its file's bytes untouched.

    The metadata keeps `categories`, a list of [id, name], and `notes`, what is odd in the files, in words.
    """

    VERSION = tfds.core.Version("1.1.0")  # 1.1.0 keeps stated sizes

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(
                {**record_features(), STATED_SIZE: tfds.features.Tensor(shape=(2,), dtype=np.int32)}
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self):
        config = self.builder_config
        coco = read_coco(Path(config.annotation_file))
        if not config.skip_corrupt:
            _require_present(coco, config)
        unreadable, resized = [], []
        bar = tqdm(coco.image_ids, desc=f"Preparing {config.split}", unit=" images", disable=None)
        for position, image_id in enumerate(bar):
            filename, stated = coco.filenames[position], coco.stated_sizes[position]
            try:
                image, size = _read_image(os.path.join(config.image_directory, filename))
            except CorruptImage as error:
                if not config.skip_corrupt:
                    raise UserError(
                        f"Image {os.path.join(config.image_directory, filename)} (id {image_id}): {error}; "
                        "config.data.skip_corrupt=True passes over such images."
                    ) from error
                unreadable.append(filename)
                continue
            if stated is not None and stated not in (size, size[::-1] if is_swapped(exif_orientation(image)) else size):
                resized.append(filename)
            made = example(image, filename, image_id, coco.annotations[position])
            yield position, made | {STATED_SIZE: np.array(stated or (0, 0), np.int32)}
        if len(unreadable) == len(coco.image_ids):
            raise UserError(f"None of the {len(unreadable)} images in {config.annotation_file} can be read.")
        self.info.metadata["categories"] = coco.categories
        self.info.metadata["notes"] = _notes(unreadable, resized, coco.without_area)


def _require_present(coco, config):
    """A wrong directory is told at once, not after an hour of reading."""
    missing = [name for name in coco.filenames if not os.path.exists(os.path.join(config.image_directory, name))]
    if missing:
        near = near_name(config.image_directory, missing[0])
        raise UserError(
            f"{len(missing)} of the {len(coco.filenames)} images that {config.annotation_file} lists are not in "
            f"{config.image_directory}, the first is {missing[0]}{near}; "
            "config.data.skip_corrupt=True passes over them."
        )


def _read_image(path):
    """(bytes, (height, width)). Raises CorruptImage also when there is no file to read."""
    try:
        with open(path, "rb") as file:
            image = file.read()
    except OSError as error:
        raise CorruptImage(f"it cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name that no file can have
        raise CorruptImage(f"it cannot be read ({error})") from error
    return image, image_size(image)


def _notes(unreadable, resized, without_area):
    notes = []
    if unreadable:
        notes.append(f"{len(unreadable)} images are missing or corrupt and are left out (the first is {unreadable[0]})")
    if resized:
        notes.append(f"{len(resized)} images have another size than annotated (the first is {resized[0]})")
    if without_area:
        notes.append(f"{without_area} annotations had no area and got their box's")
    return notes

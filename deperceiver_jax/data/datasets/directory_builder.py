"""TFDS builder for a split of any directory of pictures and annotations, whatever its layout."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from deperceiver_jax.data.datasets.coco.near_name import near_name
from deperceiver_jax.data.datasets.listing import Listing, SplitFiles, file_state
from deperceiver_jax.data.datasets.ordered_builder import OrderedBuilder
from deperceiver_jax.data.datasets.record import BOXES_ARE_SHARES, STATED_SIZE, example, record_features
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size, is_swapped
from deperceiver_jax.errors import UserError


@dataclass(eq=False)
class DirectoryConfig(tfds.core.BuilderConfig):
    """Which files make the split. The name, made of what they are, tells prepared data sets apart.

    image_bytes: what the images take on the disk, and will take again when they are prepared.
    """

    read: Callable[[], Listing] | None = None
    listed_by: str = ""
    image_directory: str = ""
    split: str = ""
    skip_corrupt: bool = False
    image_bytes: int = 0


def directory_config(files: SplitFiles, split: str, skip_corrupt: bool) -> DirectoryConfig:
    """The config of a split, named after its annotations' state and its images' place, sizes and times.

    So a picture that is changed, turned, added or deleted makes another data set. Nothing is read: names are looked up
    in two seconds for COCO's 118 000 on a disk of this machine.
    """
    states = [file_state(files.image_directory / name) for name in files.names]
    place = os.fspath(files.image_directory.resolve())
    identity = json.dumps([files.state, place, split, bool(skip_corrupt), states])
    return DirectoryConfig(
        name=f"{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        description=f"split {split} of {files.listed_by} with {files.image_directory}",
        read=files.read,
        listed_by=files.listed_by,
        image_directory=os.fspath(files.image_directory),
        split=split,
        skip_corrupt=skip_corrupt,
        image_bytes=sum(state[0] for state in states if state),
    )


class CocoDirectory(OrderedBuilder):
    """Every image that is listed, in ascending order of id, its file's bytes untouched.

    The metadata keeps `categories`, a list of [id, name], and `notes`, what is odd in the files, in words.
    """

    VERSION = tfds.core.Version("1.2.0")  # 1.1.0 keeps stated sizes, 1.2.0 boxes as shares

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(
                {
                    **record_features(),
                    STATED_SIZE: tfds.features.Tensor(shape=(2,), dtype=np.int32),
                    BOXES_ARE_SHARES: np.bool_,
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self):
        config = self.builder_config
        listing = config.read()
        if not config.skip_corrupt:
            _require_present(listing, config)
        unreadable, resized = [], []
        bar = tqdm(listing.image_ids, desc=f"Preparing {config.split}", unit=" images", disable=None)
        for position, image_id in enumerate(bar):
            filename, stated = listing.filenames[position], listing.stated_sizes[position]
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
            annotations = listing.annotations[position]
            if listing.boxes_are_shares:
                annotations = annotations._replace(area=annotations.area * size[0] * size[1])
            made = example(image, filename, image_id, annotations) | {BOXES_ARE_SHARES: listing.boxes_are_shares}
            yield position, made | {STATED_SIZE: np.array(stated or (0, 0), np.int32)}
        if len(unreadable) == len(listing.image_ids):
            raise UserError(f"None of the {len(unreadable)} images that {config.listed_by} lists can be read.")
        self.info.metadata["categories"] = listing.categories
        self.info.metadata["notes"] = listing.notes + _notes(unreadable, resized)


def _require_present(listing, config):
    """A wrong directory is told at once, not after an hour of reading."""
    missing = [name for name in listing.filenames if not os.path.exists(os.path.join(config.image_directory, name))]
    if missing:
        near = near_name(config.image_directory, missing[0])
        raise UserError(
            f"{len(missing)} of the {len(listing.filenames)} images that {config.listed_by} lists are not in "
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


def _notes(unreadable, resized):
    notes = []
    if unreadable:
        notes.append(f"{len(unreadable)} images are missing or corrupt and are left out (the first is {unreadable[0]})")
    if resized:
        notes.append(f"{len(resized)} images have another size than annotated (the first is {resized[0]})")
    return notes

"""A split read where it lies, without preparing it: the headers of its pictures, or all pixels."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.datasets.index import Index, flatten
from deperceiver_jax.data.datasets.listing import Listing, SplitFiles
from deperceiver_jax.data.datasets.orientation import orient
from deperceiver_jax.data.datasets.source import Source, require_pixels
from deperceiver_jax.data.image_header import CorruptImage, exif_orientation, image_size, is_swapped
from deperceiver_jax.errors import UserError

_KINDS = {  # how files of each kind begin -> how their names end
    b"\xff\xd8": (".jpg", ".jpeg", ".jfif"),
    b"\x89PNG": (".png",),
    b"BM": (".bmp",),
    b"GIF8": (".gif",),
    b"RIFF": (".webp",),
    b"II*\0": (".tif", ".tiff"),
    b"MM\0*": (".tif", ".tiff"),
}


class UnpreparedSource(Source):
    """A split whose images are read from their own files."""

    def image_bytes(self, position: int) -> bytes:
        return (self.prepared / self.filename(position)).read_bytes()


@dataclass
class Split:
    """What is known of a split. Names are as the annotations have them."""

    files: SplitFiles
    source: Source
    index: Index
    num_bytes: int = 0  # of the files that can be read
    broken: dict[str, str] = field(default_factory=dict)  # name -> why it cannot be read
    resized: list[str] = field(default_factory=list)  # of another size than annotated
    misnamed: list[str] = field(default_factory=list)  # of another kind than the name ends for
    notes: list[str] = field(default_factory=list)  # what is odd besides, in words
    problems: list[str] = field(default_factory=list)  # what a run would end with

    def path(self, name: str) -> Path:
        return self.files.image_directory / name


def read_split(files: SplitFiles, config_data: ConfigDict, split: str, *, decode: bool) -> Split:
    """Reads the headers of all pictures of a split, or decodes them. Raises UserError where nothing is known then."""
    listing = files.read()
    broken: dict[str, str] = {}
    resized, misnamed, kept, num_bytes = [], [], [], 0
    headers = _headers(files, listing, split, decode)
    for position, header in enumerate(headers):
        name, stated = listing.filenames[position], listing.stated_sizes[position]
        if isinstance(header, CorruptImage):
            broken[name] = str(header)
            continue
        size, orientation, start, length = header
        num_bytes += length
        if stated is not None and stated not in (size, size[::-1] if is_swapped(orientation) else size):
            resized.append(name)
        endings = next((endings for bytes, endings in _KINDS.items() if start.startswith(bytes)), None)
        if endings and not name.lower().endswith(endings):
            misnamed.append(name)
        annotations = listing.annotations[position]
        if listing.boxes_are_shares:
            annotations = annotations._replace(area=annotations.area * size[0] * size[1])
        kept.append((listing.image_ids[position], position, (size, stated or (0, 0), orientation), name, annotations))
    if not kept:
        first = next(iter(broken))
        raise UserError(
            f"None of the {len(broken)} images that {files.listed_by} lists can be read, the first is {first}: "
            f"{broken[first]}."
        )
    index, turned = orient(flatten(kept, list(broken), listing.boxes_are_shares), config_data.exif_orientation)
    problems = []
    try:
        require_pixels(index, f"{config_data.directory}, split {split}")
    except UserError as error:
        problems.append(str(error))
    classes = ClassMap.from_categories(listing.categories)
    source = UnpreparedSource(files.image_directory, split, classes, index, 1.0)
    return Split(files, source, index, num_bytes, broken, resized, misnamed, listing.notes + turned, problems)


def _headers(files: SplitFiles, listing: Listing, split: str, decode: bool) -> Iterator:
    """Of each picture ((height, width) as stored, orientation, first bytes, length), or the CorruptImage it raised."""
    paths = [os.path.join(files.image_directory, name) for name in listing.filenames]
    with ThreadPoolExecutor(os.cpu_count() if decode else 1) as pool:
        found = pool.map(_decoded if decode else _header, paths)
        title = "Decoding" if decode else "Looking at"
        yield from tqdm(found, desc=f"{title} {split}", total=len(paths), unit=" images", disable=None)


def _header(path):
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length == 0:
                return CorruptImage("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
                return image_size(image), exif_orientation(image), image[:4], length
    except CorruptImage as error:
        return error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return CorruptImage(f"it cannot be read ({getattr(error, 'strerror', None) or error})")


def _decoded(path):
    header = _header(path)
    if isinstance(header, CorruptImage):
        return header
    try:
        pixels = decode_image(Path(path).read_bytes(), 1)
    except CorruptImage as error:
        return error
    if pixels.shape[:2] != header[0]:
        return CorruptImage(f"it has {pixels.shape[0]} x {pixels.shape[1]} pixels, not {header[0]} as its header says")
    return header


def doubled_boxes(index: Index) -> int:
    """Annotations that are there once more with the same picture, class and box."""
    image = np.repeat(np.arange(len(index.image_ids)), np.diff(index.offsets))
    category = np.unique(index.category_id, return_inverse=True)[1]  # an id may be larger than a double tells apart
    rows = np.column_stack([image, category, index.is_crowd, index.boxes])
    return len(rows) - len(np.unique(rows, axis=0))

"""Which files `--images` means, where the picture of each goes, and the frames of a video."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import BUCKETS, as_path, is_bucket, reason, require_readable, require_writable

KEPT_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # pictures of other kinds become .png
FORMATS = set("AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM PSD SGI TGA TIFF WEBP".split())  # taken from a folder
MOST_FRAMES = 1000  # a second: a header that says more gives the unit of its times instead
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")  # taken when they are named

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a file that is no video gets our sentence alone


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def find_files(places: Iterable[str]) -> list[Path]:
    """The files of all places, each once: what find_images finds there, or for "-" in the lines of standard input.

    Raises UserError for a place without any.
    """
    named = itertools.chain.from_iterable(_lines_of_stdin() if place == "-" else [place] for place in places)
    found: dict[Path, Path] = {}
    for path in itertools.chain.from_iterable(map(find_images, named)):
        found.setdefault(_identity(path), path)
    return list(found.values())


def _identity(path: Path) -> Path:
    """The same for all ways to name a file; a link to a file is another one."""
    return path if is_bucket(path) else Path(os.path.realpath(path.parent), path.name)


def find_images(pattern: str) -> list[Path]:
    """The images of a folder, a file, or the files that a pattern matches, in order of name. Raises UserError for none.

    What is there by this very name comes first: [1] and * are letters of a name before they are a pattern.
    """
    place = os.path.expanduser(pattern)
    try:
        if is_bucket(place):
            return _find_in_bucket(place)
        if os.path.isdir(place):
            kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
            found = [path for path in Path(place).iterdir() if kinds.get(path.suffix.lower()) in FORMATS]
        else:
            found = [Path(place)] if os.path.isfile(place) else map(Path, set(glob(place, recursive=True)))
        paths = sorted(path for path in found if path.is_file())
    except OSError as error:
        raise UserError(f"--images: {error.filename} cannot be read: {reason(error)}.") from error
    if not paths:
        raise UserError(f"--images: there is no image at {pattern}.")
    return paths


def _find_in_bucket(pattern: str) -> list[Path]:
    """`find_images` of a bucket, in which a pattern has no **."""
    folder, _, name = pattern.rpartition("/")
    looked_in = as_path(folder if re.search(r"[*?\[]", name) else pattern)
    require_readable("--images", looked_in)
    if re.search(r"[*?\[]", name):
        found = list(looked_in.glob(name))
    elif looked_in.is_dir():
        found = list(looked_in.iterdir())
    else:
        found = [looked_in] if looked_in.exists() else []
    kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in found if kinds.get(path.suffix.lower()) in FORMATS)
    if videos := [path for path in found if is_video(path)]:
        raise UserError(f"--images: {videos[0]} is a video, which is read from this machine alone; copy it.")
    if not paths:
        raise UserError(f"--images: there is no image at {pattern}.")
    return paths


def _lines_of_stdin() -> list[str]:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("--images=-: standard input is closed; give it one path a line.")
    lines = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
    if not any(lines):
        raise UserError("--images=-: standard input names no image; give it one path a line.")
    return [line for line in lines if line]


def output_files(paths: Sequence[Path], output: Path) -> list[Path]:
    """Where each picture or video goes: under `output` as they lie under their common folder, by a name of its own.

    Raises UserError.
    """
    if len({is_bucket(path) for path in paths}) > 1:
        raise UserError("--images: some are in a bucket, and some on this machine; take one after the other.")
    if any(".." in path.parts for path in paths):
        paths = [_identity(path) for path in paths]
    paths = [path if is_bucket(path) else path.absolute() for path in paths]
    prefix = BUCKETS if is_bucket(paths[0]) else ""
    common = as_path(prefix + os.path.commonpath([str(path.parent).removeprefix(prefix) for path in paths]))
    if is_bucket(output) == is_bucket(paths[0]) and output.resolve() == common.resolve():
        raise UserError(f"--output: {output} is where the images are; take another folder.")
    require_writable("--output", output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is not a folder.")
    targets = [output / path.relative_to(common) for path in paths]
    taken = {target for target in targets if target.suffix.lower() in (*KEPT_ENDINGS, ".mp4")}
    for i, target in enumerate(targets):
        if target not in taken:
            ending = ".mp4" if is_video(target) else ".png"
            names = (Path(f"{target}{f'-{k}' if k > 1 else ''}{ending}") for k in itertools.count(1))
            targets[i] = next(name for name in names if name not in taken)
            taken.add(targets[i])
    images = {path.resolve() for path in paths}
    if overwritten := next((target for target in targets if target.resolve() in images), None):
        raise UserError(f"--output: {overwritten} would take the place of one of the images; take another folder.")
    return targets


class Video:
    """A video file: its frames upright in RGB, one after the other. Raises UserError for a file that is none."""

    def __init__(self, path: Path):
        self._path, self._capture = path, cv2.VideoCapture(str(path))
        if not self._capture.isOpened() or not self._capture.grab():
            raise UserError(f"{path} is not a video that OpenCV can read.")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frames_per_second = rate if 0 < rate <= MOST_FRAMES else 25.0
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # 0 where the file does not say

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Once. Warns where the video ends before the frame that its header promises."""
        count, more = 0, True
        while more:
            read, frame = self._capture.retrieve()
            if not read:
                break
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            count += 1
            more = self._capture.grab()
        self._capture.release()
        if count < 0.9 * self.num_frames:
            short = f"ends after {count} of {self.num_frames} frames"
            print(f"warning: {self._path} {short}; the rest cannot be read.", file=sys.stderr, flush=True)

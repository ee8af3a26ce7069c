"""Keeps what was found, as soon as it is there: drawn pictures and videos, crops, results in their formats."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import make_folder, written_whole
from deperceiver_jax.prediction.pictures import read_pixels
from deperceiver_jax.prediction.results import Looked, Results
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.fonts import readable

Pixels = UInt8[np.ndarray, "h w 3"]
Keep = Callable[[Looked, Pixels], None]


class Keeper:
    """Counts, and writes below `output`. draw: pictures with their boxes; crops: what is in each box."""

    def __init__(self, output: Path, formats: Sequence[Results], classes: ClassMap, *, draw: bool, crops: bool):
        self._output, self._formats, self._name_of = output, formats, readable(classes)
        self._draws, self._crops = draw, crops
        self.done = self.objects = self.unread = 0  # files, detections, and files that could not be read

    def picture(self, looked: Looked) -> None:
        """A picture of a file, which is read again to be drawn."""
        if self._draws or (self._crops and len(looked.found)):
            pixels = read_pixels(looked.file)
            if self._draws:
                save(self._output / looked.place, self._draw(looked, pixels))
            self._save_crops(looked, pixels)
        self._add(looked)
        self.done += 1

    @contextlib.contextmanager
    def video(self, place: Path, frames_per_second: float, as_frames: bool) -> Iterator[Keep]:
        """A function that keeps a frame; they become a video at `place`, or pictures in the folder `place`.frames.

        However the block ends, the video has the frames until then.
        """
        with _VideoFile(self._output / place, frames_per_second) as file:

            def keep(looked: Looked, pixels: Pixels) -> None:
                one = Path(f"{place}.frames", f"{looked.frame:06d}.jpg")
                looked = looked._replace(place=one)
                if self._draws and as_frames:
                    save(self._output / one, self._draw(looked, pixels))
                elif self._draws:
                    file.write(self._draw(looked, pixels))
                self._save_crops(looked, pixels)
                self._add(looked)

            yield keep
        self.done += 1

    def _add(self, looked: Looked) -> None:
        for results in self._formats:
            results.add(looked)
        self.objects += len(looked.found)

    def _draw(self, looked: Looked, pixels: Pixels) -> Pixels:
        found = looked.found
        return draw_detections(pixels, found.boxes, found.labels, found.scores, self._name_of)

    def _save_crops(self, looked: Looked, pixels: Pixels) -> None:
        """crops/CLASS/NAME-K.jpg, as far as a box lies in its picture."""
        if not self._crops:
            return
        height, width = pixels.shape[:2]
        for k, (box, name) in enumerate(zip(looked.found.boxes, looked.found.names, strict=True)):
            left, top = (max(0, math.floor(edge)) for edge in box[:2])
            right, bottom = (min(side, math.ceil(edge)) for side, edge in zip((width, height), box[2:], strict=True))
            if left < right and top < bottom:
                folder = self._output / "crops" / (re.sub(r"[^\w .-]", "_", str(name)).strip(" .") or "_")
                save(folder / f"{looked.place}-{k}.jpg", pixels[top:bottom, left:right])


def save(path: Path, pixels: Pixels) -> None:
    """Writes a picture, whole or not at all. Raises OSError."""
    make_folder(path.parent)
    kind = Image.registered_extensions()[path.suffix.lower()]
    with written_whole(path) as partial:
        Image.fromarray(np.ascontiguousarray(pixels)).save(partial, kind, quality=92)


class _VideoFile:
    """An MP4 that begins with its first frame and takes its name when it is closed."""

    def __init__(self, path: Path, frames_per_second: float):
        self._path, self._rate = path, frames_per_second
        self._whole = contextlib.ExitStack()
        self._writer: cv2.VideoWriter | None = None

    def write(self, pixels: Pixels) -> None:
        if self._writer is None:
            make_folder(self._path.parent)
            partial = self._whole.enter_context(written_whole(self._path, ".mp4"))
            fourcc = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(partial), fourcc, self._rate, pixels.shape[1::-1])
            if not writer.isOpened():
                size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels at {self._rate:g} frames a second"
                error = UserError(f"--output: {self._path} cannot be written: OpenCV makes no MP4 of {size} there.")
                self._whole.__exit__(UserError, error, None)  # nothing takes the name
                raise error
            self._writer = writer
        self._writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))

    def __enter__(self) -> "_VideoFile":
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:
            self._writer.release()
        self._whole.close()

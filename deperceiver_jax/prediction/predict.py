"""What `deperceiver predict` does."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import UInt8
from tqdm import tqdm

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError, check_between, check_choice
from deperceiver_jax.files import as_path, make_folder, reason
from deperceiver_jax.prediction.detections import PictureDetections
from deperceiver_jax.prediction.detector import PictureDetector
from deperceiver_jax.prediction.files import Video, find_files, is_video, output_files
from deperceiver_jax.prediction.keeper import Keeper
from deperceiver_jax.prediction.results import FORMATS, Looked, read_image_ids
from deperceiver_jax.program.command_line import nearest
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import load_for_command


def predict(values: flags.FlagValues, config_arguments: Sequence[str]) -> None:
    """The program. values: flags of deperceiver_jax/predict.py; config_arguments: `--config...`. Raises UserError."""
    for name in ("images", "output"):
        if not values[name].value:
            raise UserError(f"--{name} is needed: {values[name].help}")
    for name in values.format:
        check_choice("--format", name, FORMATS)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    files, output = find_files(values.images), as_path(values.output)
    places = [target.relative_to(output) for target in output_files(files, output)]
    image_ids = choose_image_ids(values.annotations, files)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    slots = choose_slots(values.classes, loaded.classes)
    keep_compiled(loaded.config.train.compilation_cache)
    detector = PictureDetector(loaded)
    print(f"Detecting with {stored.items} in {len(files)} files.", flush=True)

    interrupted = False
    jobs = list(zip(files, places, image_ids, strict=True))
    try:
        make_folder(output)
        with contextlib.ExitStack() as until_end:
            formats = [until_end.enter_context(FORMATS[name](output, loaded.classes)) for name in set(values.format)]
            keeper = Keeper(output, formats, loaded.classes, draw=values.draw, crops=values.save_crops)
            find = Find(detector, values.score_threshold, slots)
            try:
                look_at_pictures(find, keeper, [job for job in jobs if not is_video(job[0])])
                look_at_videos(find, keeper, [job for job in jobs if is_video(job[0])], values.frames, len(files))
            except KeyboardInterrupt:  # what is done is kept
                interrupted = True
    except OSError as error:
        raise UserError(f"--output: {error.filename or output} cannot be written: {reason(error)}.") from error
    print(f"Wrote {keeper.done} of {len(files)} files with {keeper.objects} detections to {output}.")
    if interrupted:
        raise UserError(f"Stopped by Ctrl-C: {output} has what was found until then.")
    if keeper.unread:
        raise UserError(f"{keeper.unread} of {len(files)} files could not be read; the warnings say which.")


class Find:
    """Pictures -> what is in them, of the classes and scores that are asked for."""

    def __init__(self, detector: PictureDetector, threshold: float, slots: Sequence[int]):
        self._detector, self._threshold, self._slots = detector, threshold, slots

    def __call__(self, pictures: Iterable[Any], total: int | None) -> Iterator[PictureDetections | UserError]:
        answers = self._detector.stream(pictures, threshold=self._threshold)
        for found in tqdm(answers, "Detecting", total, unit=" images", disable=None):
            yield found if isinstance(found, UserError) else found.take(np.isin(found.labels, self._slots))


def look_at_pictures(find: Find, keeper: Keeper, jobs: Sequence[tuple[Path, Path, int]]) -> None:
    """jobs: (file, place below the output folder, image_id) of each."""
    for job, found in zip(jobs, find((job[0] for job in jobs), len(jobs)), strict=True):
        if isinstance(found, UserError):
            warn(keeper, found)
        else:
            keeper.picture(Looked(*job, found))


def look_at_videos(
    find: Find, keeper: Keeper, jobs: Sequence[tuple[Path, Path, int]], as_frames: bool, first_id: int
) -> None:
    """Frame by frame; as_frames: draws each into a file of its own. Frames have the image_ids from first_id on."""
    image_ids = itertools.count(first_id)
    for file, place, _ in jobs:
        try:
            video = Video(file)
        except UserError as error:
            warn(keeper, error)
            continue
        frames = Retained(video)
        with keeper.video(place, video.frames_per_second, as_frames) as keep:
            for number, found in enumerate(find(frames, video.num_frames or None)):
                assert isinstance(found, PictureDetections)  # frames are in memory: none of them cannot be read
                keep(Looked(file, place, next(image_ids), found, number), frames.waiting.pop(number))


class Retained:
    """Frames that are kept until somebody takes them from `waiting`, where they are by number."""

    def __init__(self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]):
        self._frames, self.waiting = frames, dict[int, np.ndarray]()

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for number, frame in enumerate(self._frames):
            self.waiting[number] = frame
            yield frame


def warn(keeper: Keeper, error: UserError) -> None:
    """Names a file that cannot be read, and counts it."""
    keeper.unread += 1
    print(f"warning: {error}", file=sys.stderr, flush=True)


def choose_image_ids(annotations: str | None, files: Sequence[Path]) -> list[int]:
    """Of --annotations, or else the files' numbers. Raises UserError."""
    if annotations is None:
        return list(range(len(files)))
    if videos := [file for file in files if is_video(file)]:
        raise UserError(f"--annotations lists pictures, not the frames of a video such as {videos[0]}.")
    return read_image_ids(as_path(annotations), files)


def choose_slots(names: Sequence[str], classes: ClassMap) -> list[int]:
    """The class slots of --classes, names or category ids; all without it. Raises UserError."""
    chosen: list[int] = []
    for name in names:
        known = list(zip(classes.slots, classes.names, classes.category_ids, strict=True))
        found = [slot for slot, its, _ in known if its == name] or [slot for slot, _, id in known if str(id) == name]
        if not found:
            raise UserError(f"--classes: the detector knows no class {name!r}{nearest(name, classes.names)}.")
        chosen += found
    return chosen or list(classes.slots)

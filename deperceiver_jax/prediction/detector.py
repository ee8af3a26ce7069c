"""Two lines of Python: a detector from a directory or the hub, and what it finds in pictures of any kind and size.

from deperceiver_jax import load
detections = load("runs/x").predict(["a.jpg", pil_image, rgb_array])
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from deperceiver_jax.data.batches.geometry import check_augmentation
from deperceiver_jax.data.batches.views import Views, check_views, has_several
from deperceiver_jax.errors import UserError, check_at_least, check_between
from deperceiver_jax.evaluation.evaluate import make_detect_step
from deperceiver_jax.evaluation.merge import merge_views
from deperceiver_jax.models import field_needs
from deperceiver_jax.prediction.detections import PictureDetections, Reader
from deperceiver_jax.prediction.pictures import Picture, Prepared, padded_sizes, prepare_views, read_pixels
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_stored
from deperceiver_jax.runs.stored_detector import find_detector
from deperceiver_jax.sharding import make_mesh, replicated, shard_batch, whole_batch
from deperceiver_jax.structures import Batch, Detections

THREADS = 4  # that read and scale pictures while the devices are busy
Result = TypeVar("Result")
CPU_BATCH = 8  # pictures that a CPU is given together at most, if nobody says so: more are no faster, and start later
PATIENCE = 8  # batches that may pass a picture which waits for others of its padded size


def load(
    directory: str | Path, checkpoint: str = "latest", config: Mapping[str, object] | None = None
) -> "PictureDetector":
    """A detector to be used on pictures: a workdir's, a checkpoint step's, an output's of import-weights, or the hub's.

    directory: where it lies, or hf://owner/name[@revision], which is fetched once.
    checkpoint: which one of a workdir: latest, best, or a step. Its moving average is taken where it has one.
    config: fields of the stored config to change, as {"eval.max_detections": 300, "precision": "bfloat16"}.
    Compiled programs are kept where config.train.compilation_cache says, unless JAX has been given a place already.
    Raises UserError for a directory without a detector, and for a field that does not exist.

    >>> detector = load("runs/x", checkpoint="best")
    """
    stored = find_detector(directory, checkpoint)
    overrides = [f"--config.{field}={value}" for field, value in (config or {}).items()]
    settings = parse_config(["load", *overrides], stored.read_config(), needs=field_needs)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        keep_compiled(settings.train.compilation_cache)
    return PictureDetector(load_stored(stored, settings))


class Seen(NamedTuple):
    """A picture whose views are under way."""

    number: int  # of the picture
    views: Views
    answers: dict[int, Detections]  # of those views that are done, by their number


class Member(NamedTuple):
    """A view in a batch."""

    seen: Seen
    view: int
    prepared: Prepared


class PictureDetector:
    """Finds objects in pictures of any size, one or many. Several threads may use one at the same time.

    Pictures are scaled as evaluation scales them and padded to one of `padded_sizes`, of which there are at most five
    (and five more for each of config.eval.scales). The detections of several views of a picture, for which config.eval
    may ask, are merged.
    Each is compiled twice at most: for batches, and for a single picture (as many as there are devices).
    """

    def __init__(self, loaded: LoadedDetector):
        """Raises UserError for fields of the config that are out of range, or do not fit the devices."""
        self.config, self.classes = loaded.config, loaded.classes
        check_augmentation(self.config.data)
        check_at_least("config.eval.batch_size", self.config.eval.batch_size, 1)
        check_views(self.config.eval)
        self.padded_sizes = padded_sizes(self.config.data, self.config.eval.scales)
        self._mesh = make_mesh(self.config.mesh.model)
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        usual = min(self.config.eval.batch_size, CPU_BATCH) if on_cpu else self.config.eval.batch_size
        self.batch_size = self.config.eval.batch_size = whole_batch(usual, self._mesh)
        self._step = make_detect_step(loaded.skeleton.merge, self.config, self._mesh)
        self._arrays = jax.device_put(loaded.arrays, replicated(self._mesh))
        self._reader = Reader(self.classes)
        self._one_compiles = threading.Lock()
        self._readers = ThreadPoolExecutor(THREADS, "reader")  # kept: threads that come and go leave memory behind

    @overload  # a str is one picture, though also an iterable of them
    def predict(  # type: ignore[overload-overlap]
        self,
        pictures: Picture,
        *,
        threshold: float = ...,
        max_detections: int | None = ...,
        batch_size: int | None = ...,
        progress: bool = ...,
    ) -> PictureDetections: ...
    @overload
    def predict(
        self,
        pictures: Iterable[Picture],
        *,
        threshold: float = ...,
        max_detections: int | None = ...,
        batch_size: int | None = ...,
        progress: bool = ...,
    ) -> list[PictureDetections]: ...

    def predict(
        self,
        pictures: Any,
        *,
        threshold: float = 0.5,
        max_detections: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Any:
        """What is in each picture, in their order; for one picture by itself, its detections by themselves.

        pictures: a path, the bytes of an image file, a PIL image or a uint8 array ([height, width, 3] in RGB, or
          [height, width] in grey), or any number of them. Those with an EXIF orientation are turned, as viewers do, and
          boxes are in the turned picture.
        threshold: detections with a lower score, in [0, 1], are left out.
        max_detections: of a picture, the best ones; at most config.eval.max_detections, which is what None means.
        batch_size: pictures that are computed together; without it `self.batch_size`, which is config.eval.batch_size,
          but on CPUs at most 8.
        progress: show a bar.
        Raises UserError for no pictures, and for one that cannot be read.

        >>> found = load("runs/x").predict("a.jpg", threshold=0.3)
        >>> found.names, found.scores, found.boxes
        """
        single = isinstance(pictures, str | Path | bytes | Image.Image) or _is_one_array(pictures)
        given = [pictures] if single else list(pictures)
        if not given:
            raise UserError("There are no pictures to look at.")
        check_between("threshold", threshold, 0, 1)
        if max_detections is not None:
            check_between("max_detections", max_detections, 1, self.config.eval.max_detections)
        found = []
        with tqdm(total=len(given), desc="Detecting", unit=" pictures", disable=not progress) as bar:
            stream = self.stream(given, threshold=threshold, max_detections=max_detections, batch_size=batch_size)
            for number, answer in enumerate(stream):
                if isinstance(answer, UserError):
                    raise UserError(str(answer) if len(given) == 1 else f"Picture {number}: {answer}")
                found.append(answer)
                bar.update()
        return found[0] if single else found

    def stream(
        self,
        pictures: Iterable[Picture],
        *,
        threshold: float = 0.5,
        max_detections: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[PictureDetections | UserError]:
        """As `predict`, but a picture at a time, in order: for a video, or a folder of any length.

        A few batches of pictures are in memory, never more. For one that cannot be read the UserError that says why is
        the answer.

        >>> for found in detector.stream(frames): ...
        """
        check_between("threshold", threshold, 0, 1)
        check_at_least("batch_size", 1 if batch_size is None else batch_size, 1)
        size = whole_batch(batch_size or self.batch_size, self._mesh)
        single = whole_batch(1, self._mesh)
        most = max_detections or self.config.eval.max_detections
        done: dict[int, PictureDetections | UserError] = {}
        waiting: dict[tuple[int, ...], list[Member]] = {}
        running: deque = deque()
        position = 0  # of the next answer

        def start(members: list[Member], count: int) -> None:
            """Runs a batch, and reads the answer of the one before while the devices are busy."""
            running.append((members, self._run([member.prepared for member in members], count)))
            if len(running) > 1:
                finish()

        def finish() -> None:
            members, detections = running.popleft()
            detections = Detections(*map(np.asarray, detections))
            if not all(np.isfinite(x[: len(members)]).all() for x in (detections.scores, detections.boxes)):
                raise UserError("The detector's answers are not finite numbers: its parameters are broken.")
            for row, (seen, view, prepared) in enumerate(members):
                seen.answers[view] = Detections(*(column[row] for column in detections))
                if len(seen.answers) == len(seen.views.example):
                    done[seen.number] = self._reader.read(self._merged(seen), prepared.original_size, threshold, most)

        def flush(members: list[Member]) -> None:
            """Runs fewer pictures than a batch has: together if they fill half of it, or else one by one."""
            if 2 * len(members) > size:
                start(members, size)
            else:
                for first in range(0, len(members), single):
                    start(members[first : first + single], single)

        ahead = 1 if has_several(self.config.eval) else 2 * THREADS  # whole pictures, or small ones
        for number, prepared in enumerate(_ahead(self._readers, self._prepare, pictures, ahead)):
            if isinstance(prepared, UserError):
                done[number] = prepared
            else:
                seen = Seen(number, prepared[0], {})
                for view, picture in enumerate(prepared[1]):
                    members = waiting.setdefault(picture.frame.shape, [])
                    members.append(Member(seen, view, picture))
                    if len(members) == size:
                        start(waiting.pop(picture.frame.shape), size)
            late = number - PATIENCE * size
            for shape in [shape for shape, members in waiting.items() if members[0].seen.number <= late]:
                flush(waiting.pop(shape))
            while position in done:
                yield done.pop(position)
                position += 1
        for members in waiting.values():
            flush(members)
        while running:
            finish()
        yield from (done[number] for number in sorted(done))

    def _prepare(self, picture: Picture) -> tuple[Views, Iterable[Prepared]] | UserError:
        """Several views of a picture are made one by one when they are needed: tiles may be many."""
        try:
            views, prepared = prepare_views(read_pixels(picture), self.config.data, self.config.eval, self.padded_sizes)
        except UserError as error:
            return error
        return views, prepared if has_several(self.config.eval) else list(prepared)

    def _merged(self, seen: "Seen") -> Detections:
        """The [K] detections of a picture, of all of its views."""
        if not has_several(self.config.eval):
            return seen.answers[0]
        answers = [seen.answers[view] for view in range(len(seen.answers))]
        stacked = Detections(*(np.stack(column) for column in zip(*answers, strict=True)))
        limits = dict(max_detections=self.config.eval.max_detections, iou=self.config.eval.merge_iou)
        return Detections(*(column[0] for column in merge_views(seen.views, stacked, **limits)))

    def _run(self, members: list[Prepared], count: int) -> Detections:
        """Starts a batch of `count`, filled up with black pictures; the answer is on its way."""
        frames, sizes, original_sizes = zip(*members, strict=True)
        fill = count - len(members)
        image = np.concatenate([np.stack(frames), np.zeros((fill, *frames[0].shape), np.uint8)])
        frame = [np.array(image.shape[1:3], np.int32)] * fill
        nothing = dict(
            boxes=np.zeros((count, 1, 4), np.float32),
            labels=np.zeros((count, 1), np.int32),
            box_valid=np.zeros((count, 1), bool),
        )
        example = np.arange(count, dtype=np.int32)
        batch = Batch(image, np.stack([*sizes, *frame]), np.stack([*original_sizes, *frame]), example, **nothing)
        with self._one_compiles:
            return self._step(self._arrays, shard_batch(batch, self._mesh))[1]


def _is_one_array(pictures: object) -> bool:
    """An array of pictures has a leading axis more."""
    return isinstance(pictures, np.ndarray) and pictures.ndim != 4


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Picture], Result], items: Iterable[Picture], most: int
) -> Iterator[Result]:
    """function(item) of each in order, at most so many of them ahead of their use in the threads of `pool`."""
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()

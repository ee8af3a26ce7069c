"""Makes batches ahead of their use: Grain's worker processes, and the shared memory in which their images travel.

Grain would copy every array into new shared memory. Here a worker draws its images right into memory that the training
process has let go of: no copy, no new pages, and nothing left to clean up when the interpreter ends.
"""

import errno
import functools
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from absl import flags
from jaxtyping import UInt8

from deperceiver_jax.errors import UserError
from deperceiver_jax.structures import Batch

IN_PROCESS_THREADS = 4  # batches that are made at the same time where there are no worker processes
SHARED_MEMORY = "/dev/shm"
FREE, HELD = 0, 1  # the last byte of a frame

Empty = Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]]  # makes the array for a batch's images, with any content
Make = Callable[[int, Empty], Batch]  # a step's batch


class Stream(Iterator[Batch]):
    """make(step, empty) for each step in order, by worker processes, or by threads of this one if num_workers is 0.

    image_bytes: of the largest batch's images. close(), the end of the steps, of the object or of the interpreter ends
    the workers. A UserError of `make` comes through, and a worker that dies is one.
    """

    def __init__(self, make: Make, steps: range, num_workers: int, image_bytes: int):
        import grain  # not above: it imports JAX, which nobody needs who only plans or reads data

        if num_workers < 0:
            raise UserError(f"config.data.num_workers is {num_workers}; it must be 0 or more.")
        _let_grain_read_its_flags()
        dataset = grain.MapDataset.range(steps.start, steps.stop)
        processes = min(num_workers, len(steps))
        directories: list[str] = []
        if processes == 0:
            threads = grain.ReadOptions(num_threads=IN_PROCESS_THREADS, prefetch_buffer_size=IN_PROCESS_THREADS)
            dataset = dataset.map(_InThread(make)).to_iter_dataset(threads)
        else:
            prefix = f"deperceiver_jax-{os.getpid()}-"
            shared = tempfile.mkdtemp(prefix=prefix, dir=SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None)
            directories = [shared, tempfile.mkdtemp(prefix=prefix)]
            dataset = dataset.map(_InWorker(make, directories, image_bytes))
            dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            workers = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(workers, _WorkerStart(directories))
        self._batches = [iter(dataset)]  # empty when closed: what is left of Grain complains as the interpreter ends
        self._frames: dict[str, mmap.mmap] = {}
        self.close = weakref.finalize(self, _end, self._batches, directories)

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        try:
            batch = next(self._batches[0])
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"A loader process died ({str(error).split('.')[0]}), mostly for lack of memory or of shared memory "
                "(docker's --shm-size), of which fewer config.data.num_workers need less."
            ) from error
        return batch if isinstance(batch, Batch) else batch.rest._replace(image=_open_frame(batch, self._frames))


def _end(batches, directories):
    batches.pop().close()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _let_grain_read_its_flags():
    """Grain asks absl for its own flags, which absl refuses in a program that parses none (a notebook, a test)."""
    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = 1


@dataclass(frozen=True)
class _InThread:
    make: Make

    def __call__(self, step: int) -> Batch:
        return self.make(step, functools.partial(np.empty, dtype=np.uint8))


@dataclass(frozen=True)
class _Sent:
    """What a worker sends. Grain, which would put every array of a tree into shared memory, sees one leaf in it."""

    rest: Batch  # without its images
    path: str  # of the frame that has them
    shape: tuple[int, ...]


class _InWorker:
    """Leaves a batch's images in a frame, a file in shared memory, which this worker keeps for later batches."""

    def __init__(self, make: Make, directories: Sequence[str], image_bytes: int):
        """directories: in shared memory, and where frames go that it has no room for."""
        self._make, self._directories, self._image_bytes = make, directories, image_bytes
        self._frames: dict[str, mmap.mmap] = {}

    def __call__(self, step: int) -> _Sent:
        path, memory = self._free_frame()
        memory[-1] = HELD
        batch = self._make(step, lambda shape: np.ndarray(shape, np.uint8, buffer=memory))
        return _Sent(batch._replace(image=None), path, batch.image.shape)

    def _free_frame(self):
        for path, memory in self._frames.items():
            if memory[-1] == FREE:
                return path, memory
        shared, spare = (os.path.join(place, f"{os.getpid()}-{len(self._frames)}") for place in self._directories)
        try:
            path = _make_file(shared, self._image_bytes + 1)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _tell_once(self._directories)
            path = _make_file(spare, self._image_bytes + 1)
        self._frames[path] = _map_file(path)
        return path, self._frames[path]


def _make_file(path, size):
    """A file whose room is taken at once: a worker that writes to one which turns out to have none is killed."""
    with open(path, "xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            os.unlink(path)
            raise
    return path


def _tell_once(directories):
    """Of all workers one says that shared memory is full."""
    shared, spare = map(os.path.dirname, directories)
    try:
        os.close(os.open(os.path.join(directories[1], "told"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(
        f"warning: {shared} is full, and pictures go through files in {spare}. Containers have more with docker's "
        "--shm-size, pods with a volume of memory there; fewer config.data.num_workers need less.",
        file=sys.stderr,
        flush=True,
    )


def _open_frame(sent, opened):
    """The images in a frame; the worker may use it again when nobody has the array, or any view of it, any more."""
    if sent.path not in opened:
        opened[sent.path] = _map_file(sent.path)
        os.unlink(sent.path)  # both sides keep it mapped; without a name it cannot outlive them
    memory = opened[sent.path]
    image = np.ndarray(sent.shape, np.uint8, buffer=memory)
    weakref.finalize(image, memory.__setitem__, -1, FREE).atexit = False
    return image


def _map_file(path):
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


@dataclass(frozen=True)
class _WorkerStart:
    """A worker leaves signals sent to the whole group to its parent, and ends when that does, however it ended."""

    directories: Sequence[str]

    def __call__(self, index: int, count: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=self._end_with_parent, daemon=True).start()

    def _end_with_parent(self):
        multiprocessing.parent_process().join()
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

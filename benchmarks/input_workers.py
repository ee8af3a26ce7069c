"""What worker processes add to the input pipeline, and how often a batch is copied on its way to the devices.

Part of input_pipeline.py, whose --workers chooses the numbers of workers:

    python benchmarks/input_pipeline.py --workers=0,1,2,4 --batch=64 --batches=6
"""

import os
import pickle
import time
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.batches.workers import _Sent

STEP = 256  # images, a global batch of published TPU runs


@dataclass
class Memory:
    """A split whose encoded images are in memory, `repeats` times over, so that a disk is not what is measured."""

    data: list[bytes]
    stored_sizes: np.ndarray
    repeats: int
    max_boxes: int = 8

    def __post_init__(self):
        self.sizes = np.tile(self.stored_sizes, (self.repeats, 1)).astype(np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    def filename(self, position: int) -> str:
        return f"{position}.jpg"

    def image_bytes(self, position: int) -> bytes:
        return self.data[position % len(self.data)]

    def orientation(self, position: int) -> int:
        return 1

    def targets(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.sizes[position].tolist()
        boxes = np.float32([[0, 0, width / 2, height / 2], [width / 4, height / 4, width, height]] * 4)
        return boxes, np.arange(8, dtype=np.int32)


def worker_rates(source: Memory, config: ConfigDict, counts: list[int], batches: int) -> dict[int, float]:
    """Images per second of wall time by number of workers. The first batches, while workers start, do not count."""
    rates = {}
    for count in counts:
        stream = iter(TrainBatches(source, ConfigDict({**config, "num_workers": count}), seed=0))
        for _ in range(max(2 * count, 2)):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        rates[count] = batches * config.batch_size / (time.perf_counter() - start)
        stream.close()
    return rates


def costs_of_a_batch(source: Memory, config: ConfigDict) -> dict[str, tuple[float, float]]:
    """{what: (megabytes, milliseconds)} of the way of one batch from a worker that has drawn it, the median of five."""
    from deperceiver_jax.sharding import make_mesh, shard_batch  # not above: workers need no JAX

    stream = iter(TrainBatches(source, ConfigDict({**config, "num_workers": 1}), seed=0))
    mesh, times, batch = make_mesh(), [], next(stream)
    start = time.perf_counter()
    batch = next(stream)
    pause = 1.0 + 2 * (time.perf_counter() - start)
    for _ in range(5):
        time.sleep(pause)  # the worker has the next one ready
        start = time.perf_counter()
        batch = next(stream)
        received = time.perf_counter()
        on_devices = shard_batch(batch, mesh)
        for array in on_devices:
            array.block_until_ready()
        placed = time.perf_counter()
        batch.image.copy()
        times.append(np.diff([start, received, placed, time.perf_counter()]) * 1e3)
        del on_devices
    receive, place, copy = np.median(times, axis=0)
    sent = len(pickle.dumps(_Sent(batch._replace(image=None), "/dev/shm/frame", batch.image.shape))) / 1e6
    images = batch.image.nbytes / 1e6
    stream.close()
    return {
        "through the queue, from worker to training process": (sent, receive),
        "through shared memory, drawn there by the worker": (images, 0.0),
        "from the host's memory to the devices": (images + sent, place),
        "for comparison: one copy of the images": (images, copy),
    }


def report(data: list[bytes], sizes: np.ndarray, config: ConfigDict, counts: list[int], batches: int) -> None:
    """Prints both."""
    source = Memory(data, sizes, repeats=-(-4 * config.batch_size // len(data)))
    print(f"Batches of {config.batch_size} from worker processes ({os.cpu_count()} cores)")
    for count, rate in worker_rates(source, config, counts, batches).items():
        where = f"{count} worker{'s' if count > 1 else ''}" if count else "no worker: threads of the training process"
        print(f"  {where:<44} {rate:7.1f} images/s   a step of {STEP} images every {STEP / rate:5.2f} s")
    print(f"A batch of {config.batch_size} on its way")
    for what, (size, milliseconds) in costs_of_a_batch(source, config).items():
        print(f"  {what:<52} {size:8.3f} MB {milliseconds:8.2f} ms")

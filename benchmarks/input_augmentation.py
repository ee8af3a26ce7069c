"""What pasted objects cost the loader, as images per second of CPU time beside the loader without it.

Part of input_pipeline.py:

    taskset -c 0 python benchmarks/input_pipeline.py --augmentations
"""

import functools
import time

import numpy as np
from ml_collections import ConfigDict

from benchmarks.input_workers import Memory
from deperceiver_jax.data.batches.loader import TrainBatches

SETTINGS = {"none": {}, "paste_objects=8": {"paste_objects": 8}}
BOXES = 8  # of a photograph, COCO's mean is 7
SIDES = (0.02, 0.5)  # of a box as shares of the image, uniform in their logarithm: two in five are small


class Annotated(Memory):
    """Encoded images in memory with boxes of COCO's sizes, the same for an image each time."""

    max_boxes = BOXES

    def targets(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(position % len(self.data))
        side = np.exp(rng.uniform(*np.log(SIDES), (BOXES, 2)))
        low = rng.uniform(0, 1 - side)
        size = np.tile(self.sizes[position][::-1], 2)
        return np.float32(np.concatenate([low, low + side], axis=1) * size), np.arange(BOXES, dtype=np.int32)


def augmentation_rates(data: list[bytes], sizes: np.ndarray, config: ConfigDict, rounds: int) -> dict[str, float]:
    """Images per second of CPU time of one thread by setting, the medians of rounds in which all take turns."""
    source = Annotated(data, sizes, repeats=-(-2 * config.batch_size // len(data)))
    empty = functools.partial(np.empty, dtype=np.uint8)
    makers = {
        name: TrainBatches(source, ConfigDict({**config, **fields, "max_boxes": 4 * BOXES}), seed=0)._make
        for name, fields in SETTINGS.items()
    }
    batches = len(data) // config.batch_size
    times = {name: [] for name in makers}
    for turn in range(rounds + 1):
        for name, make in makers.items():
            start = time.process_time()
            for step in range(turn * batches, (turn + 1) * batches):
                make(step, empty)
            times[name].append(time.process_time() - start)
    # The first round warms up.
    return {name: batches * config.batch_size / float(np.median(spent[1:])) for name, spent in times.items()}


def report(data: list[bytes], sizes: np.ndarray, config: ConfigDict, rounds: int) -> None:
    """Prints the rates and their shares of the first."""
    print("The loader with and without pasted objects, training transforms")
    rates = augmentation_rates(data, sizes, config, rounds)
    for name, rate in rates.items():
        print(f"  {name:<24} {rate:7.1f} images/s per core {rate / rates['none']:6.1%}")

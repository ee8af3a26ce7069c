"""How long COCO's metric and the report take, and how much memory, at the size of COCO's val2017: 5,000 images.

    taskset -c 0 env RAYON_NUM_THREADS=1 python benchmarks/evaluation.py --part=metric
    taskset -c 0 env RAYON_NUM_THREADS=1 python benchmarks/evaluation.py --part=report
    taskset -c 0 python benchmarks/evaluation.py --part=pycocotools

Each part runs in a process of its own, so that its peak of memory is its own; what it starts from is made before the
clock and said, too. Four of five boxes are found, 15 % of them called another class; the rest of the detections are
false. `metric` is from a detector's answers as arrays to metrics.json and detections.json, `report` from these to
report.html, `pycocotools` from its two files to its twelve statistics, which are held against the metric's.
"""

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.base import base  # noqa: E402
from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap  # noqa: E402
from deperceiver_jax.data.datasets.record import Annotations  # noqa: E402
from deperceiver_jax.evaluation.coco_metric import STATISTICS, ground_truth  # noqa: E402
from deperceiver_jax.evaluation.evaluate import count_detections, write_results  # noqa: E402
from deperceiver_jax.report.page import write_report  # noqa: E402
from deperceiver_jax.structures import Detections  # noqa: E402

PARTS = ("metric", "report", "pycocotools")


class SyntheticSplit:
    """As much of `data.Source` as evaluation and the report read; every picture is the same."""

    annotated = True
    area_scale = 1.0
    classes = ClassMap.from_categories(COCO_CATEGORIES.items())

    def __init__(self, rng: np.random.Generator, images: int, boxes: int):
        self.image_ids = np.arange(images, dtype=np.int64)
        self.sizes = np.tile(np.array([[480, 640]], np.int32), (images, 1))
        self.image = np.sort(rng.integers(0, images, boxes))
        self.category = np.array(self.classes.category_ids)[(rng.zipf(1.5, boxes) - 1) % 80]
        side = np.exp(rng.uniform(np.log(8), np.log(300), (boxes, 2)))
        corner = rng.uniform(0, 1, (boxes, 2)) * (np.array([640, 480]) - side)
        self.boxes = np.concatenate([corner, side], axis=1)
        self.crowd = rng.uniform(size=boxes) < 0.01
        self.offsets = np.searchsorted(self.image, np.arange(images + 1))
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC).astype(int)
        noisy = np.clip(smooth + rng.integers(-25, 25, smooth.shape), 0, 255).astype(np.uint8)
        self.jpeg = simplejpeg.encode_jpeg(noisy)

    def __len__(self) -> int:
        return len(self.image_ids)

    def annotations(self, i: int) -> Annotations:
        rows = slice(*self.offsets[i : i + 2])
        boxes = self.boxes[rows]
        return Annotations(
            boxes, self.category[rows], self.crowd[rows], boxes[:, 2] * boxes[:, 3], np.arange(rows.start, rows.stop)
        )

    def filename(self, i: int) -> str:
        return f"{i:012d}.jpg"

    def image_bytes(self, i: int) -> bytes:
        return self.jpeg

    def orientation(self, i: int) -> int:
        return 1


def draw_detections(rng: np.random.Generator, split: SyntheticSplit, each: int) -> Detections:
    """`each` of every image, the best score first."""
    number = len(split)
    slots = np.array(split.classes.slots)
    boxes = rng.uniform([0, 0, 5, 5], [600, 440, 200, 200], (number, each, 4))
    labels, scores = rng.choice(slots, (number, each)), rng.beta(1, 8, (number, each))
    for i in range(number):
        rows = np.arange(*split.offsets[i : i + 2])
        rows = rows[rng.uniform(size=len(rows)) < 0.8][:each]
        boxes[i, : len(rows)] = split.boxes[rows] * rng.uniform(0.9, 1.1, (len(rows), 4))
        true = rng.uniform(size=len(rows)) < 0.85
        labels[i, : len(rows)] = np.where(true, split.category[rows], rng.choice(slots, len(rows)))
        scores[i, : len(rows)] = rng.beta(4, 2, len(rows))
    order = np.argsort(-scores, axis=1)
    scores, labels = (np.take_along_axis(values, order, axis=1) for values in (scores, labels))
    boxes = np.take_along_axis(boxes, order[..., None], axis=1)
    boxes[..., 2:] += boxes[..., :2]
    return Detections(scores.astype(np.float32), labels.astype(np.int32), boxes.astype(np.float32))


def timed(name: str, action: Callable[[], Any]) -> Any:
    """What `action` returns; prints its seconds and the process's peak of memory before and after."""
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    answer = action()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name}: {seconds:.2f} s, {cpu:.2f} s of CPU; peak {peak():.0f} MiB, {before:.0f} MiB before", flush=True)
    return answer


def peak() -> float:
    """Mebibytes of memory that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_pycocotools(truth: Path, results: Path) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        run = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="metric", help="What is timed.")
    parser.add_argument("--images", type=int, default=5000, help="Images, of 640 x 480 pixels.")
    parser.add_argument("--boxes", type=int, default=36000, help="Boxes of all images; one in a hundred is a crowd.")
    parser.add_argument("--detections", type=int, default=100, help="Detections of each image.")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    split = SyntheticSplit(rng, options.images, options.boxes)
    detections = draw_detections(rng, split, options.detections)
    config = base()
    config.model = {"name": "synthetic"}

    def metric(folder):
        metrics, results = count_detections(detections, split, config)
        write_results(folder, metrics, results)
        return metrics, results

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.part == "metric":
            metrics, _ = timed("metric and files", lambda: metric(folder))
            print("  ".join(f"{statistic} {metrics[statistic]:.4f}" for statistic in STATISTICS))
            return
        metrics, results = metric(folder)
        if options.part == "report":
            inputs = (folder / "report.html", split, metrics, results, config)
            timed("report", lambda: write_report(*inputs, split="validation", step="0"))
            print(f"report.html: {inputs[0].stat().st_size / 1e6:.2f} MB")
        else:
            (folder / "truth.json").write_text(json.dumps(ground_truth(split)))
            del results
            run = timed("pycocotools", lambda: run_pycocotools(folder / "truth.json", folder / "detections.json"))
            distance = max(abs(value - metrics[name]) for name, value in zip(STATISTICS, run.stats, strict=True))
            print(f"greatest difference of a statistic to the metric's: {distance:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Trains every family from scratch on the same photographs, a folder in COCO's layout, and compares them.

    python benchmarks/real_objects.py --coco=/data/deeppcb --rates=1e-3,3e-3 --pictures=1500  # each row's rate
    python benchmarks/real_objects.py --coco=/data/deeppcb --seeds=0,1,2 --rate detr=3e-3

Rows are configs/demo.py's detectors, DePerceiver+ as in configs/small.py, and the published DePerceiver, one backbone
for all. All see equally many pictures of one size, and learn with Muon, in batches of the size that was best for the
row. With --rates the validation split is not touched: the training split is divided, 80 % to train on and 20 % to
evaluate, and --output gets a table of what came of each rate; --batch_size compares batches alike. Every row and seed
is a run of train.py and one of eval.py in OUTPUT/ROW/SEED: what is finished is not run again and what was interrupted
goes on. Writes OUTPUT/table.md, OUTPUT/curves.csv and, with matplotlib (pip install '.[plots]'), OUTPUT/curves.png,
which `small_objects.py --draw=OUTPUT/curves.csv` draws again.

mAP and F at IoU 0.33 are counted as DeepPCB's authors do (github.com/tangsanli5201/DeepPCB): a detection is right if it
overlaps a defect of its class by more than 0.33 that no surer detection has; AP is the mean precision at the right
ones, over all defects; F is the harmonic mean of precision and recall, here at the score where it is highest.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import small_objects  # noqa: E402
from configs.base import base  # noqa: E402
from deperceiver_jax.data.datasets.layouts.recognise import find_split  # noqa: E402
from deperceiver_jax.data.datasets.source import existing_directory  # noqa: E402
from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.runs.stored_evaluation import newest_evaluation, read_json  # noqa: E402


class Row(NamedTuple):
    config: str  # FILE:VARIANT in configs/
    fields: Sequence[str] = ()
    batch_size: int = 4


TWO_STAGE = ["--config.model.refine=True", "--config.model.two_stage=True", "--config.model.places=pixels"]
ROWS = {
    "deperceiver_plus": Row("small.py:deperceiver_plus_narrow", batch_size=2),
    "deformable_detr_two_stage": Row("demo.py:deformable_detr", TWO_STAGE),
    "smca": Row("demo.py:smca"),
    "detr": Row("demo.py:detr"),
    "deperceiver": Row("demo.py:deperceiver"),
    "deperceiver_published": Row("ladder.py:published"),
}
IOU = 0.33
METRICS = ("AP", "AP50", "AP75", "APs", "APm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco", type=Path, required=True, help="a folder in COCO's layout")
    parser.add_argument("--rows", type=_names, default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0])
    parser.add_argument("--pictures", type=int, default=6000, help="that every run sees, those seen again included")
    parser.add_argument("--batch_size", type=int, default=0, help="of all rows; 0: each row's")
    parser.add_argument("--pixels", type=int, default=320, help="of the short side")
    parser.add_argument("--rates", type=lambda s: s.split(","), default=[], help="compare rates on the training split")
    parser.add_argument("--rate", nargs="*", default=[], metavar="ROW=RATE", help="learning rates that are not 2e-3")
    parser.add_argument("--output", type=Path, default=Path("runs/real_objects"))
    parser.add_argument("--table_only", action="store_true", help="train nothing, tell what is there")
    parser.add_argument("fields", nargs="*", help="further fields for all runs: --config.loss.weight_giou=4")
    arguments, further = parser.parse_known_args()
    if wrong := [field for field in further if not field.startswith("--config.")]:
        parser.error(f"{wrong[0]} is neither a flag of this program nor a field of the config.")
    sizes = {row: arguments.batch_size or ROWS[row].batch_size for row in arguments.rows}
    if not 1 <= min(sizes.values()) <= max(sizes.values()) <= arguments.pictures:
        parser.error(f"--pictures={arguments.pictures} makes no batch of {max(sizes.values())}.")
    rates = dict(pair.split("=", 1) for pair in arguments.rate if "=" in pair)
    if wrong := [pair for pair in arguments.rate if pair.split("=")[0] not in ROWS or "=" not in pair]:
        parser.error(f"--rate {wrong[0]} is not ROW=RATE with a row of {', '.join(ROWS)}.")

    data = base().data
    data.directory = str(arguments.coco)
    try:
        find_split(existing_directory(data), data, "train")
    except UserError as error:
        parser.error(f"--coco: {error}")

    fields = [*fields_of_all(arguments.pixels), *arguments.fields, *further]
    if arguments.rates:
        folder = divide_training_split(arguments.coco, arguments.output / "training_split")
        fields += ["--config.data.layout=one_file", f"--config.data.directory={folder.absolute()}"]
    else:
        fields.append(f"--config.data.directory={arguments.coco.absolute()}")
    tried = {f"lr{rate}": rate for rate in arguments.rates} or {"": ""}
    if not arguments.table_only:
        for seed, row, (name, rate) in itertools.product(arguments.seeds, arguments.rows, tried.items()):
            own = fields_of_row(ROWS[row], sizes[row], arguments.pictures, rate or rates.get(row, "2e-3"))
            run(row, seed, arguments.output / name, [*own, *fields])
    runs = {name: small_objects.read_rows(arguments.output / name, arguments.rows) for name in tried}
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.rates:
        table = small_objects.compare_rates(runs)
    else:
        table = make_table(runs[""], arguments.output, arguments.pictures)
        small_objects.draw_curves(small_objects.write_curves(runs[""], arguments.output / "curves.csv"))
    (arguments.output / ("rates.md" if arguments.rates else "table.md")).write_text(table)
    print(table)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    return names


# ------------------------------------------------------------------------------------------------------------- runs


def fields_of_all(pixels: int) -> list[str]:
    """What makes all rows see the same pictures, and learn from them with the same optimizer."""
    size, most = pixels, 2 * pixels
    data = dict(name="coco_directory", scales=f"({size},)", max_size=most, crop_probability=0.0, buckets=1)
    data |= dict(eval_scale=size, eval_max_size=most, eval_buckets=1, num_workers=0)
    return ["--config.optimizer.name=muon", *(f"--config.data.{name}={value}" for name, value in data.items())]


def fields_of_row(row: Row, batch_size: int, pictures: int, rate: str) -> list[str]:
    """How a row sees so many pictures, with three evaluations on the way."""
    steps = pictures // batch_size
    every = max(steps // 3, 1)
    train = dict(num_steps=steps, eval_every=every, checkpoint_every=every, log_every=50)
    fields = [f"--config.data.batch_size={batch_size}", f"--config.optimizer.learning_rate={rate}", *row.fields]
    return [*fields, *(f"--config.train.{name}={value}" for name, value in train.items())]


def run(row: str, seed: int, output: Path, fields: list[str]) -> None:
    """Trains and evaluates one row with one seed, unless that is done."""
    workdir = small_objects.train(row, seed, output, fields, ROWS[row].config)
    if not list((workdir / "eval").glob("*/detections.json")):
        with open(workdir.parent / "log", "a") as log:
            command = [sys.executable, str(ROOT / "eval.py"), f"--workdir={workdir}", "--checkpoint=latest"]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=True)


def divide_training_split(coco: Path, folder: Path) -> Path:
    """`folder` with links to the training split's pictures and its annotation file, which train.py then divides."""
    files = find_split(coco, base().data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("pictures.json", Path(files.listed_by)), ("pictures", Path(files.image_directory))):
        if not (folder / name).exists():
            (folder / name).symlink_to(target.absolute())
    return folder


# ------------------------------------------------------------------------------------------------------------ report


def make_table(runs: dict[str, list[small_objects.Run]], output: Path, pictures: int) -> str:
    """Markdown: a line a row, means over the seeds with the lowest and highest in brackets where there are several."""
    columns = [*METRICS, f"mAP at IoU {IOU}", f"F at IoU {IOU}", "images/s", "GiB"]
    lines = [f"{pictures} pictures seen.", "", "| row | seeds | " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for row, found in runs.items():
        stored = [newest_evaluation(run.parent / "run") for run in sorted((output / row).glob("*/run.json"))]
        metrics = [read_json(path / "metrics.json") for path in stored]
        at_iou = [mean_ap_and_f(_truth(path), read_json(path / "detections.json")) for path in stored]
        cells = [small_objects.spread([m[name] for m in metrics]) for name in METRICS]
        cells += [small_objects.spread(list(column)) for column in zip(*at_iou, strict=True)]
        cells += [f"{statistics.mean(run.batch_size / run.step_seconds for run in found):.1f}"]
        cells += [f"{statistics.mean(run.peak_gib for run in found):.1f}"]
        lines.append(f"| {row} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _truth(evaluation: Path) -> list[dict]:
    """The annotations of the split that was evaluated."""
    data = base().data
    data.update(json.loads((evaluation.parents[1] / "config.json").read_text())["data"])
    files = find_split(Path(data.directory), data, data.eval_split)
    return json.loads(Path(files.listed_by).read_text())["annotations"]


def mean_ap_and_f(truth: list[dict], detections: list[dict], iou: float = IOU) -> tuple[float, float]:
    """(mAP over classes, best F over scores) of COCO's annotations and detections at one IoU."""
    boxes = defaultdict(list)
    for box in truth:
        boxes[box["category_id"], box["image_id"]].append(box["bbox"])
    taken = {key: np.zeros(len(found), bool) for key, found in boxes.items()}
    count, right, scores = defaultdict(int), defaultdict(list), defaultdict(list)
    for (category, _), found in boxes.items():
        count[category] += len(found)
    for detection in sorted(detections, key=lambda d: -d["score"]):
        key = detection["category_id"], detection["image_id"]
        overlaps = _iou(detection["bbox"], boxes[key]) * ~taken[key] if key in taken else np.zeros(1)
        best = int(np.argmax(overlaps))
        hit = overlaps[best] > iou
        if hit:
            taken[key][best] = True
        right[key[0]].append(hit)
        scores[key[0]].append(detection["score"])
    ap = [_mean_precision(np.array(right[category]), total) for category, total in count.items()]
    order = np.argsort([-score for category in scores for score in scores[category]], kind="stable")
    hits = np.cumsum(np.array([hit for category in scores for hit in right[category]], float)[order])
    total = sum(count.values())
    f = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    return float(np.mean(ap)), float(f.max(initial=0.0))


def _mean_precision(right, total):
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(np.sum(precision[right.astype(bool)]) / total)


def _iou(box, others):
    x, y, w, h = np.array(others, float).T
    shared_w = np.minimum(x + w, box[0] + box[2]) - np.maximum(x, box[0])
    shared_h = np.minimum(y + h, box[1] + box[3]) - np.maximum(y, box[1])
    shared = np.maximum(shared_w, 0) * np.maximum(shared_h, 0)
    return shared / (w * h + box[2] * box[3] - shared)


if __name__ == "__main__":
    main()

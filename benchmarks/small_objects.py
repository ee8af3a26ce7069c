"""Trains a ladder of detectors on the same pictures of many small objects, with several seeds, and compares them.

    python benchmarks/small_objects.py --rows=published,gaussian,proposals --seeds=0,1,2        # the built-in pictures
    python benchmarks/small_objects.py --rows=neck_blocks,detr --coco=/data/folder --overfit --steps=3000
    python benchmarks/small_objects.py --rows=detr,neck_blocks --seeds=100 --rates=3e-4,1e-3,3e-3  # which learning rate

Rows are variants of configs/ladder.py. Every row and seed is a run of train.py in OUTPUT/ROW/SEED: what is finished is
not run again and what was interrupted goes on, so the same command resumes, and more rows or seeds can be added; with
other fields, steps or data it takes another --output. With
--overfit the images that are trained on, always at one size and never flipped, are those that are evaluated. Writes
OUTPUT/table.md, OUTPUT/curves.csv and, with matplotlib (pip install '.[plots]'), OUTPUT/curves.png; --draw=FILE.csv
draws FILE.png anew and trains nothing. With --rates the runs are in OUTPUT/lrRATE/ROW/SEED and the table says what came
of each rate.
"""

import argparse
import csv
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import ladder  # noqa: E402

METRICS = ("AP", "AP50", "APs", "APm", "APl")
SIZES = ("APs", "APm", "APl")
LEAST = 0.01  # AP under which its ratio to APs says nothing
GOALS = (0.3, 0.5)  # of AP50, whose first evaluation is reported


# Photographs are larger than the built-in pictures, and have more objects.
COCO = (
    "--config.data.name=coco_directory",
    "--config.data.scales=(96,112,128)",
    "--config.data.max_size=192",
    "--config.data.eval_scale=128",
    "--config.data.eval_max_size=192",
    "--config.data.buckets=2",
    "--config.model.num_queries=64",
)
OVERFIT = ("--config.data.eval_split=train", "--config.data.flip_probability=0.0", "--config.data.scales=(64,)")
# What is to be learned by heart may be small, and is cheaper.
COCO_OVERFIT = (
    "--config.data.batch_size=8",
    "--config.data.max_size=96",
    "--config.data.eval_scale=64",
    "--config.data.eval_max_size=96",
)


Curve = list[tuple[int, dict[str, float]]]  # (pictures seen, metrics) of every evaluation


class Run(NamedTuple):
    """One row, one seed."""

    seed: str
    batch_size: int
    curve: Curve
    step_seconds: float  # median over the logged intervals
    peak_gib: float  # largest resident memory of the process: its host memory; a GPU's own is not in it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=_names, default=list(ladder.VARIANTS), help="variants of configs/ladder.py")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0: the config's")
    parser.add_argument("--coco", default="", help="a COCO-format folder instead of the built-in pictures")
    parser.add_argument("--overfit", action="store_true", help="evaluate the images that are trained on")
    parser.add_argument("--rates", type=lambda s: s.split(","), default=[], help="learning rates to compare")
    parser.add_argument("--output", type=Path, default=Path("runs/small_objects"))
    parser.add_argument("--table_only", action="store_true", help="train nothing, tell what is there")
    parser.add_argument("--draw", type=Path, metavar="FILE.csv", help="draw these curves, and do nothing else")
    parser.add_argument("fields", nargs="*", help="further fields for all runs: --config.optimizer.learning_rate=5e-4")
    arguments, further = parser.parse_known_args()
    if arguments.draw:
        if not arguments.draw.is_file():
            parser.error(f"--draw: there is no file {arguments.draw}.")
        draw_curves(arguments.draw)
        return
    fields = [*arguments.fields, *further]
    if wrong := [field for field in fields if not field.startswith("--config.")]:
        parser.error(f"{wrong[0]} is neither a flag of this program nor a field of the config.")
    if arguments.steps:
        every = max(arguments.steps // 10, 1)
        fields += [f"--config.train.{name}={every}" for name in ("eval_every", "checkpoint_every")]
        fields.append(f"--config.train.num_steps={arguments.steps}")
    if arguments.overfit:
        fields = [*OVERFIT, *(COCO_OVERFIT if arguments.coco else ()), *fields]
    if arguments.coco:
        fields = [*COCO, f"--config.data.directory={arguments.coco}", *fields]

    rates = {f"lr{rate}": [f"--config.optimizer.learning_rate={rate}"] for rate in arguments.rates} or {"": []}
    if not arguments.table_only:
        # A first seed of every row, before the second of any.
        for seed, row, (name, rate) in itertools.product(arguments.seeds, arguments.rows, rates.items()):
            train(row, seed, arguments.output / name, fields + rate)
    runs = {name: read_rows(arguments.output / name, arguments.rows) for name in rates}
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = compare_rates(runs) if arguments.rates else make_table(runs[""])
    (arguments.output / "table.md").write_text(table)
    print(table)
    if not arguments.rates:
        draw_curves(write_curves(runs[""], arguments.output / "curves.csv"))


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ladder.VARIANTS]:
        raise argparse.ArgumentTypeError(f"no row {unknown[0]!r}; there are {', '.join(ladder.VARIANTS)}")
    return names


# ------------------------------------------------------------------------------------------------------------- runs


def train(row: str, seed: int, output: Path, fields: list[str], config: str = "") -> Path:
    """A run in output/row/seed, unless it has finished; returns its workdir.

    `config`: FILE:VARIANT in configs/, if it is not configs/ladder.py's row. Ends the program if a run fails or has
    finished with other fields.
    """
    workdir = output / row / str(seed)
    done = workdir / "run.json"
    if done.exists():
        if (before := json.loads(done.read_text())["fields"]) != fields:
            told = " ".join(before) or "no further fields"
            sys.exit(f"{workdir} is a finished run with {told}. For other fields, take another --output.")
        return workdir / "run"
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / 'configs' / (config or f'ladder.py:{row}')}"]
    command += [f"--workdir={workdir / 'run'}", f"--config.seed={seed}", *fields]
    print(f"{row}, seed {seed}: {workdir / 'log'}", flush=True)
    start = time.perf_counter()
    with open(workdir / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{row}, seed {seed} ended with status {os.waitstatus_to_exitcode(status)}; see {workdir / 'log'}.")
    facts = {"seconds": time.perf_counter() - start, "peak_gib": usage.ru_maxrss / 2**20, "machine": machine()}
    facts["fields"] = fields
    done.write_text(json.dumps(facts) + "\n")
    return workdir / "run"


def read_rows(directory: Path, rows: list[str]) -> dict[str, list[Run]]:
    """The finished runs of each row that has some."""
    found = {row: [read_run(done.parent) for done in sorted(directory.glob(f"{row}/*/run.json"))] for row in rows}
    return {row: runs for row, runs in found.items() if runs}


def read_run(directory: Path) -> Run:
    """What a run's metrics.jsonl says."""
    lines = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    config = json.loads((directory / "run/config.json").read_text())
    size = config["data"]["batch_size"]
    curve = [(size * line["step"], {name: line[name] for name in METRICS}) for line in lines if "AP50" in line]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]  # the first one compiled
    seconds = size / statistics.median(rates) if rates else float("nan")
    return Run(directory.name, size, curve, seconds, json.loads((directory / "run.json").read_text())["peak_gib"])


def machine() -> str:
    """Where it ran, in words."""
    import jax

    device = jax.devices()[0]
    return f"{platform.platform()}, {os.cpu_count()} cores, {device.device_kind}, jax {jax.__version__}"


# ------------------------------------------------------------------------------------------------------------ report


def make_table(runs: dict[str, list[Run]]) -> str:
    """Markdown: a line a row, means over the seeds with the lowest and highest in brackets where there are several."""
    head = ["row", "seeds", *METRICS[:3], "APs/AP", *(f"steps to AP50 {goal}" for goal in GOALS), "s/step", "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, found in runs.items():
        last = [run.curve[-1][1] for run in found]
        cells = [row, str(len(found)), *(spread([m[name] for m in last]) for name in METRICS[:3])]
        cells.append(spread([m["APs"] / m["AP"] if m["AP"] >= LEAST else float("nan") for m in last]))
        cells += [reached([steps_to(run, goal) for run in found]) for goal in GOALS]
        cells += [f"{statistics.mean(run.step_seconds for run in found):.2f}"]
        cells += [f"{statistics.mean(run.peak_gib for run in found):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare_rates(runs: dict[str, dict[str, list[Run]]]) -> str:
    """Markdown: the last AP50 of each row with each rate, means over the seeds, and the rate of the highest."""
    lines = ["| row | " + " | ".join(f"AP50, {rate}" for rate in runs) + " | best |", "|" + "---|" * (len(runs) + 2)]
    for row in dict.fromkeys(row for found in runs.values() for row in found):
        ends = {
            rate: statistics.mean(run.curve[-1][1]["AP50"] for run in found[row])
            for rate, found in runs.items()
            if row in found
        }
        cells = [f"{ends[rate]:.3f}" if rate in ends else "-" for rate in runs]
        lines.append(f"| {row} | {' | '.join(cells)} | {max(ends, key=ends.get)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean, and the range of several; - where one is not a number."""
    if any(map(math.isnan, values)):
        return "-"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.3f}, {max(values):.3f}]"


def steps_to(run: Run, goal: float) -> int | None:
    """The first evaluated step with AP50 of at least `goal`."""
    return next((seen // run.batch_size for seen, metrics in run.curve if metrics["AP50"] >= goal), None)


def reached(steps: list[int | None]) -> str:
    """Mean steps of the seeds that got there, and how many did not."""
    there = [step for step in steps if step is not None]
    missing = len(steps) - len(there)
    text = f"{statistics.mean(there):.0f}" if there else "never"
    return f"{text} ({missing} of {len(steps)} never)" if there and missing else text


def write_curves(runs: dict[str, list[Run]], path: Path) -> Path:
    """A line for every evaluation of every run; `path`."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["row", "seed", "pictures", *METRICS])
        for row, found in runs.items():
            for run in found:
                table.writerows([row, run.seed, seen, *(f"{at[m]:.4f}" for m in METRICS)] for seen, at in run.curve)
    return path


def read_curves(path: Path) -> dict[str, list[Curve]]:
    """The curves of each row's seeds; a metric that was left empty is missing."""
    curves: dict[str, dict[str, Curve]] = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            metrics = {name: float(line[name]) for name in METRICS if line[name]}
            curves.setdefault(line["row"], {}).setdefault(line["seed"], []).append((int(line["pictures"]), metrics))
    return {row: list(seeds.values()) for row, seeds in curves.items()}


def draw_curves(path: Path) -> None:
    """AP50 and APs by pictures seen, and the last AP by size: a line a row, the range of its seeds as a band.

    Of `write_curves`' file, beside it.
    """
    try:
        import matplotlib
    except ImportError:
        print("No curves: matplotlib is missing (pip install '.[plots]').")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    curves = read_curves(path)
    for number, (row, found) in enumerate(curves.items()):
        style = dict(color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3])

        def line(ax, places, values, marker="", style=style, row=row):
            """`values`: of each run, at every place."""
            values = list(zip(*values, strict=True))
            means = [statistics.mean(at) for at in values]
            ax.plot(places, means, marker=marker, label=row.replace("_", " "), **style)
            ax.fill_between(places, [min(at) for at in values], [max(at) for at in values], **style, alpha=0.15)

        seen = [pictures for pictures, _ in found[0]]
        equal = [curve for curve in found if [pictures for pictures, _ in curve] == seen]
        for ax, name in zip(axes, ("AP50", "APs"), strict=False):
            line(ax, seen, [[metrics[name] for _, metrics in curve] for curve in equal])
        ends = [curve[-1][1] for curve in found if set(curve[-1][1]) == set(METRICS)]
        sizes = [name for name in SIZES if all(end[name] >= 0 for end in ends)]  # -1: the data has none
        if ends:
            line(axes[2], sizes, [[end[name] for name in sizes] for end in ends], marker="o")
    titles = ("AP50 by pictures seen", "APs by pictures seen", "AP by size of objects, at the end")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, ylim=(0, None))
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(curves), 7))
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    print(f"Drew {picture}.")


if __name__ == "__main__":
    main()

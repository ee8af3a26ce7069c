"""The rows of a comparison: runs, several seeds of one config as one row with its spread, and published figures."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hotcoco
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.evaluation.coco_metric import SUMMARY, Counted
from deperceiver_jax.runs.metrics_file import read_metrics
from deperceiver_jax.runs.stored_evaluation import evaluated_data, newest_evaluation, read_json
from deperceiver_jax.runs.workdir import CONFIG, METRICS, flat_fields, read_config, tell_apart

PUBLISHED = Path(__file__).with_name("published.json")
CONFIDENCE = 0.95
MEMORY = {"device": "device_memory_gib", "host": "host_memory_gib"}  # fields of a training line
MAY_DIFFER = ("seed", "data.num_workers", "data.prepared_directory", "train.compilation_cache")  # between seeds


class Run(NamedTuple):
    """What a workdir says of the evaluation of its last step, and of the way to it."""

    name: str
    workdir: Path
    config: ConfigDict
    step: str
    metrics: dict  # of metrics.json
    results: list[dict]  # of detections.json
    lines: list[dict]  # of metrics.jsonl


class Row(NamedTuple):
    """A line of the table. Numbers are means over `runs`; one of them is the run itself, none a published row."""

    name: str
    runs: list[Run]
    metrics: dict[str, float]  # those of SUMMARY that are known
    spread: dict[str, float]  # standard deviation over seeds, where there are several
    epochs: float | None
    source: str  # of a published row


def read_run(workdir: Path, name: str) -> Run:
    """Raises UserError for a workdir without an evaluation, or with one of before 0.2.0."""
    config = read_config(workdir / CONFIG)
    evaluation = newest_evaluation(workdir)
    metrics, results = (read_json(evaluation / file) for file in ("metrics.json", "detections.json"))
    if "by_class" not in metrics:
        raise UserError(f"{evaluation}/metrics.json was written before 0.2.0; run eval.py again.")
    lines = [row for _, row in read_metrics(workdir / METRICS).rows]
    return Run(name, workdir, config, evaluation.name, metrics, results, lines)


def require_same_data(runs: Sequence[Run]) -> None:
    """Raises UserError for runs that are known to have been evaluated on different data."""
    evaluated = [(run.workdir, evaluated_data(run.workdir / "eval" / run.step)) for run in runs]
    known = [(workdir, data) for workdir, data in evaluated if data is not None]
    for workdir, data in known[1:]:
        first, same = known[0]
        if data != same:
            told, other = tell_apart(same, data)
            raise UserError(f"{workdir} was evaluated on other data than {first}: {told} there, {other} here.")


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [workdir.resolve().parts for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("A workdir is given twice.")


def group(runs: Sequence[Run], median_of_last: int) -> list[Row]:
    """A row for each config, in the order of its first run: runs that differ in MAY_DIFFER alone are one row.

    A second run of one seed is a row of its own: it tells nothing about seeds.

    median_of_last: each number is the median over so many of the run's last evaluations, as DETR's ablations report;
      0: those of the evaluation of the last step. Raises UserError when a run has fewer.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    of_seed: Counter[tuple[str, int]] = Counter()
    for run in runs:
        fields = {name: value for name, value in flat_fields(run.config).items() if name not in MAY_DIFFER}
        text, seed = json.dumps(fields, sort_keys=True, default=str), run.config.seed
        groups.setdefault((text, of_seed[text, seed]), []).append(run)
        of_seed[text, seed] += 1
    rows = []
    for together in groups.values():
        found = [_numbers(run, median_of_last) for run in together]
        known = {name: [numbers[name] for numbers in found if numbers.get(name, -1.0) >= 0] for name in SUMMARY}
        metrics = {
            name: statistics.fmean(values) if len(values) == len(found) else -1.0 for name, values in known.items()
        }
        spread = {name: statistics.stdev(values) for name, values in known.items() if len(values) == len(found) > 1}
        name = together[0].name if len(together) == 1 else f"{together[0].name} ({len(together)} seeds)"
        epochs = [run.lines[-1].get("epoch") for run in together if run.lines]
        rows.append(Row(name, together, metrics, spread, epochs[0] if len(set(epochs)) == 1 else None, ""))
    return rows


def _numbers(run: Run, median_of_last: int) -> dict[str, float]:
    if not median_of_last:
        return run.metrics
    lines = [line for line in run.lines if line["split"] == run.config.data.eval_split][-median_of_last:]
    if len(lines) < median_of_last:
        raise UserError(f"{run.workdir} has {len(lines)} evaluations; --median_of_last is {median_of_last}.")
    return {name: statistics.median(line.get(name, -1.0) for line in lines) for name in SUMMARY}


def published_rows(families: Sequence[str]) -> list[Row]:
    """What papers published of these families. Raises UserError for a family of which there is nothing."""
    stored = json.loads(PUBLISHED.read_text())
    for family in families:
        check_choice("--published", family, sorted({entry["family"] for entry in stored}))
    rows = []
    for entry in stored:
        if entry["family"] in families:
            metrics = {name: entry[name] for name in SUMMARY if name in entry}
            if "APs" in metrics:
                metrics["APs_over_AP"] = metrics["APs"] / metrics["AP"]
            rows.append(Row(entry["name"], [], metrics, {}, entry["epochs"], entry["source"]))
    return rows


def intervals(first: Sequence[Counted], other: Sequence[Counted], samples: int) -> dict[str, tuple[float, float]]:
    """Bounds by name of how much the mean over `other` differs from that over `first`, two rows' runs, at 95 %
    confidence; `samples`: draws of the split's images."""
    if not samples:
        return {}
    if len(first) == len(other) == 1:
        told = hotcoco.compare(first[0].run, other[0].run, n_bootstrap=samples, seed=0, confidence=CONFIDENCE)["ci"]
        return {name: (bounds["lower"], bounds["upper"]) for name, bounds in told.items()}
    draws = [_change_in_a_draw(first, other, draw) for draw in tqdm(range(samples), "Drawing", disable=None)]
    ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    bounds = {name: np.quantile([draw[name] for draw in draws], ends) for name in draws[0]}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _change_in_a_draw(first: Sequence[Counted], other: Sequence[Counted], draw: int) -> dict[str, float]:
    """The difference of the means where every run is counted on the same drawn images, which its number decides."""

    def changes(runs) -> dict[str, float]:
        """The mean over `runs`, less the first run's; empty for that one alone."""
        total: dict[str, float] = {}
        for run in runs:
            if run is not first[0]:
                told = hotcoco.compare(first[0].run, run.run, n_bootstrap=1, seed=draw)["ci"]
                total = {name: total.get(name, 0.0) + told[name]["lower"] for name in told}
        return {name: value / len(runs) for name, value in total.items()}

    before, after = changes(first), changes(other)
    return {name: after[name] - before.get(name, 0.0) for name in after}


def step_milliseconds(run: Run) -> float | None:
    """Median time of a training step, from the images per second that the log has."""
    speeds = [line["images_per_second"] for line in run.lines if line.get("images_per_second")]
    return 1000 * run.config.data.batch_size / statistics.median(speeds) if speeds else None


def peak_memory(run: Run) -> dict[str, float]:
    """{"device" or "host": the most GiB that the log has}; nothing of a run that logged none."""
    found = {kind: [line[name] for line in run.lines if name in line] for kind, name in MEMORY.items()}
    return {kind: max(values) for kind, values in found.items() if values}


def memory_text(row: Row) -> str:
    """The most memory of any run of the row in GiB, and where it is."""
    found = [item for run in row.runs for item in peak_memory(run).items()]
    return "{1:.2f} {0}".format(*max(found, key=lambda item: item[1])) if found else ""


def learning_curves(run: Run) -> list[dict]:
    """A row a line of the log: `epoch`, `images` and `hours` so far, and the line's `AP`, `APs` and `loss`.

    Hours are of training alone, from the log's images per second.
    """
    batch, rows = run.config.data.batch_size, []
    hours, before, speed = 0.0, 0, None
    for line in run.lines:
        speed = line.get("images_per_second") or speed
        if speed and line["step"] > before:
            hours, before = hours + (line["step"] - before) * batch / speed / 3600, line["step"]
        row = {"run": run.name, "epoch": line.get("epoch"), "images": line["step"] * batch, "hours": round(hours, 5)}
        if line["split"] == run.config.data.eval_split:
            rows.append(row | {name: line[name] for name in ("AP", "APs") if line.get(name, -1) >= 0})
        elif line["split"] == "train" and "loss" in line:
            rows.append(row | {"loss": round(line["loss"], 4)})
    return rows

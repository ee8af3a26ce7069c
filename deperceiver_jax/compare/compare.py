"""What `deperceiver compare` does."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deperceiver_jax.compare.page import write_comparison
from deperceiver_jax.compare.rows import (
    Row,
    Run,
    group,
    intervals,
    memory_text,
    names_of,
    published_rows,
    read_run,
    require_same_data,
    step_milliseconds,
)
from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import Counted, count, ground_truth
from deperceiver_jax.runs.workdir import CLASSES, read_classes

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APs_over_AP")


def compare(folders: Sequence[Path], values: flags.FlagValues, output: Path) -> None:
    """The program. folders: the workdirs; values: flags of compare/__main__.py. Raises UserError."""
    published = published_rows(values.published)
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    classes = [read_classes(folder / CLASSES) for folder in folders]
    for folder, other in zip(folders[1:], classes[1:], strict=True):
        require_same_classes(classes[0], str(folders[0]), other, str(folder))
    require_same_data(runs)
    rows = group(runs, values.median_of_last)
    draws = 0 if values.median_of_last else values.bootstrap  # a median is not of one set of detections
    bounds = differences(rows, draws)
    print(table([*rows, *published], bounds))
    write_comparison(output, rows, published, bounds)
    print(f"Wrote {output}.")


def differences(rows: list[Row], draws: int) -> list[dict[str, tuple[float, float]]]:
    """Of each row, the bounds of its difference to the first."""
    if not draws or len(rows) == 1:
        return [{} for _ in rows]
    counted = count_runs([run for row in rows for run in row.runs])
    first, *others = [[counted[run.name] for run in row.runs] for row in rows]
    return [{}, *(intervals(first, other, draws) for other in others)]


def count_runs(runs: list[Run]) -> dict[str, Counted]:
    """The detections of every run by its name, counted against the first one's data set. Raises UserError for
    detections of other images."""
    first = runs[0]
    config = first.config
    source = open_source(config.data, config.data.eval_split)
    require_same_classes(read_classes(first.workdir / CLASSES), str(first.workdir), source.classes, "its data set")
    truth = ground_truth(source)
    images = {image["id"] for image in truth["images"]}
    for other in runs:
        strangers = {row["image_id"] for row in other.results} - images
        if strangers:
            raise UserError(f"{other.workdir} was evaluated on other images than {first.workdir}: {min(strangers)}.")
    limits = {"max_detections": config.eval.max_detections_per_class, "area_scale": source.area_scale}
    return {other.name: count(truth, other.results, **limits) for other in runs}


def table(rows: list[Row], bounds: list[dict]) -> str:
    """A line a row; AP with its difference to the first row and that one's interval, or with its spread."""
    lines = [["run", "epochs", *(name.replace("_over_", "/") for name in SHOWN), "AP - first", "ms/step", "GiB"]]
    first = rows[0].metrics["AP"]
    for number, row in enumerate(rows):
        cells = [row.name, "" if row.epochs is None else f"{row.epochs:g}"]
        for name in SHOWN:
            value = row.metrics.get(name, -1.0)
            text = "-" if value < 0 else f"{value:.3f}"
            cells.append(f"{text} ± {row.spread[name]:.3f}" if name in row.spread else text)
        difference = f"{row.metrics['AP'] - first:+.3f}" if number and row.runs else ""
        if row.runs and "AP" in bounds[number]:
            low, high = bounds[number]["AP"]
            difference += f" [{low:+.3f}, {high:+.3f}]"
        speeds = [speed for one in row.runs if (speed := step_milliseconds(one)) is not None]
        time = f"{sum(speeds) / len(speeds):.0f}" if speeds else ""
        measured = [difference, time, memory_text(row)]
        lines.append([*cells, *measured] if not row.source else [*cells, f"published: {row.source}", "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )

"""The comparison as one HTML file, made as the report is."""

from collections.abc import Sequence
from pathlib import Path

from deperceiver_jax.compare.charts import all_charts
from deperceiver_jax.compare.rows import Row, memory_text, step_milliseconds
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import make_folder, reason, write_whole
from deperceiver_jax.pages.template import fill, render
from deperceiver_jax.report.page import ROOM as REPORT
from deperceiver_jax.report.page import libraries

ROOM = Path(__file__).parent
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APs_over_AP")


def write_comparison(
    path: Path, rows: Sequence[Row], published: Sequence[Row], bounds: Sequence[dict[str, tuple[float, float]]]
) -> None:
    """Writes `path`. bounds: of each of `rows`, of its difference to the first. Raises UserError."""
    runs = [run for row in rows for run in row.runs]
    first, *others = runs
    classes = []
    for k, row in enumerate(first.metrics["by_class"]):
        entries = [run.metrics["by_class"][k] for run in others]
        changes = [e["AP"] - row["AP"] if min(e["AP"], row["AP"]) >= 0 else None for e in entries]
        classes.append({"name": row["name"], "boxes": row["boxes"], "AP": row["AP"], "changes": changes})
    page = render(
        ROOM,
        f"{len(runs)} runs compared",
        scripts=(libraries(), (REPORT / "page.js").read_text()),
        columns=COLUMNS,
        rows=list(zip(rows, bounds, strict=True)),
        published=published,
        runs=runs,
        times={run.name: step_milliseconds(run) for run in runs},
        memories={row.name: memory_text(row) for row in rows},
        classes=classes,
    )
    data = {"charts": all_charts([*rows, *published], runs)}
    try:
        make_folder(path.parent)
        write_whole(path, fill(page, data))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from error

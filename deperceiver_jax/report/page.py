"""The report of an evaluation as one HTML file: tables, charts and pictures with all that is needed to show them."""

import functools
from pathlib import Path

import numpy as np
import vl_convert
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import SUMMARY, ground_truth
from deperceiver_jax.files import make_folder, reason, write_whole
from deperceiver_jax.pages.template import as_json, fill, render
from deperceiver_jax.report import gallery
from deperceiver_jax.report.analysis import analyse, boxes_by_class
from deperceiver_jax.report.charts import NOTHING, TOGETHER, all_charts, confused_pairs

LARGEST = 5_000_000  # bytes of the file
ROOM = Path(__file__).parent
COLUMNS = ("boxes", "AP", "AP50", "APs", "APm", "APl", "AR", "F1", "threshold", "precision", "recall")


def write_report(
    path: Path, source, metrics: dict, results: list[dict], config: ConfigDict, *, split: str, step: str
) -> None:
    """Writes `path`, at most LARGEST bytes: what metrics.json says, and what else ground truth and detections tell.

    source: the split. metrics, results: what `evaluate` gave of it. split, step: their names in the title. Raises
    UserError when the file cannot be written or the detections are of other images.
    """
    truth = ground_truth(source)
    known = {row["category_id"] for row in metrics["by_class"]}
    results = [row for row in results if row["category_id"] in known]
    position = {id: i for i, id in enumerate(np.asarray(source.image_ids).tolist())}
    strangers = {row["image_id"] for row in results} - position.keys()
    if strangers:
        raise UserError(f"The detections are of other images than split {split} has: of {min(strangers)}, for one.")
    counting = {"max_detections": config.eval.max_detections_per_class, "area_scale": source.area_scale}
    analysis = analyse(truth, results, **counting)
    of_box, of_detection = (
        np.array([position[row["image_id"]] for row in rows], int) for rows in (truth["annotations"], results)
    )
    kinds = gallery.choose(analysis, of_box, of_detection, len(source))
    pictures = gallery.describe(analysis, source, truth, results, kinds, of_box, of_detection)
    data = {
        "charts": all_charts(analysis, metrics["by_size"]),
        "classes": analysis.names,
        "pictures": pictures,
        "threshold": analysis.threshold,
    }
    told = analysis.counted.run.calibration(n_bins=10)
    page = render(
        ROOM,
        f"{config.model.name} on {config.data.name}, {split}, {'step ' if step.isdigit() else ''}{step}",
        scripts=(libraries(), (ROOM / "page.js").read_text(), (ROOM / "gallery.js").read_text()),
        images=len(source),
        boxes=sum(boxes_by_class(analysis.counted)),
        detections=len(results),
        metrics={name: metrics[name] for name in SUMMARY},
        rows=[row | {"name": name} for row, name in zip(metrics["by_class"], analysis.names, strict=True)],
        columns=COLUMNS,
        pairs=confused_pairs(analysis),
        threshold=analysis.threshold,
        calibration_error=told["ece"],
        together=TOGETHER,
        nothing=NOTHING,
    )
    room = LARGEST - len(page.encode()) - len(as_json(data).encode())
    for picture, address in zip(pictures, gallery.pixels(source, kinds, room - 40 * len(pictures)), strict=True):
        picture["src"] = address
    try:
        make_folder(path.parent)
        write_whole(path, fill(page, data))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from error


@functools.cache
def libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, about 900 kB."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")

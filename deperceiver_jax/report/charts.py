"""The report's charts: Altair makes and checks Vega-Lite's descriptions, which the page draws."""

from typing import Any

import altair as alt
import numpy as np

from deperceiver_jax.evaluation.coco_metric import MATCH_IOU, precision_table
from deperceiver_jax.report.analysis import Analysis, boxes_by_class, threshold_curves

BLUE, GREEN, RED, ORANGE = "#2f6db3", "#2c8c5a", "#c8452f", "#d98a00"
MOST_CURVES = 100  # classes that have curves of their own: those with the most boxes
MOST_CONFUSED = 14  # classes of the matrix
MOST_PAIRS = 20  # of classes that were taken for one another
TOGETHER = "all classes"
NOTHING = "nothing"
TIDE_ERRORS = {
    "Miss": "missed",
    "Cls": "wrong class",
    "Loc": "imprecise place",
    "Both": "class and place",
    "Dupe": "found twice",
    "Bkg": "nothing there",
}  # Source: TIDE, arXiv:2008.08115


def all_charts(analysis: Analysis, by_size: list[dict]) -> dict[str, dict]:
    """Vega-Lite's description of every chart, by the id of its place on the page."""
    charts = {
        "precision_recall": precision_recall(analysis),
        "sizes": sizes(by_size),
        "errors": errors(analysis),
        "confusion": confusion(analysis),
        "calibration": calibration(analysis),
        "thresholds": thresholds(analysis),
    }
    return {name: chart.properties(width="container").to_dict() for name, chart in charts.items()}


def drawn_classes(analysis: Analysis) -> list[int]:
    """Positions of the classes that have boxes, at most MOST_CURVES, those with the most boxes."""
    boxes = boxes_by_class(analysis.counted)
    order = sorted(range(len(boxes)), key=lambda k: -boxes[k])[:MOST_CURVES]
    return sorted(k for k in order if boxes[k])


def precision_recall(analysis: Analysis) -> alt.Chart:
    """Precision at COCO's 101 recall points for IoU 0.5, 0.75 and the mean over 0.5 to 0.95."""
    table = precision_table(analysis.counted)  # [IoU, recall, class]
    classes = drawn_classes(analysis)
    with_boxes = [k for k, boxes in enumerate(boxes_by_class(analysis.counted)) if boxes]
    shown = {TOGETHER: table[..., with_boxes].mean(-1)} if with_boxes else {}
    shown |= {analysis.names[k]: table[..., k] for k in classes}
    rows = [
        {"class": name, "IoU": iou, "precision": _rounded(values)}
        for name, curve in shown.items()
        for iou, values in (("0.50", curve[0]), ("0.75", curve[5]), ("0.50 to 0.95", curve.mean(0)))
    ]
    return (
        _of_one_class(rows, ["precision"], "recall")
        .mark_line(strokeWidth=2)
        .encode(
            _share(alt.X, "recall", "recall"),
            _share(alt.Y, "precision", "precision"),
            alt.Color("IoU:N", scale=alt.Scale(range=[BLUE, ORANGE, GREEN]), legend=alt.Legend(orient="bottom")),
            tooltip=["IoU:N", "recall:Q", "precision:Q"],
        )
        .properties(height=300)
    )


def thresholds(analysis: Analysis) -> alt.Chart:
    """Precision, recall and F1 at IoU 0.5 of the detections from each score on."""
    classes = drawn_classes(analysis)
    curves = threshold_curves(analysis, classes)
    rows = []
    for name, (precision, recall) in zip([TOGETHER, *(analysis.names[k] for k in classes)], curves, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * precision * recall / (precision + recall)
        for measure, values in (("precision", precision), ("recall", recall), ("F1", f1)):
            rows.append({"class": name, "measure": measure, "value": _rounded(values)})
    colors = alt.Scale(domain=["F1", "precision", "recall"], range=[BLUE, ORANGE, GREEN])
    return (
        _of_one_class(rows, ["value"], "threshold")
        .mark_line(strokeWidth=2)
        .encode(
            _share(alt.X, "threshold", "least score"),
            _share(alt.Y, "value", ""),
            alt.Color("measure:N", title=None, scale=colors, legend=alt.Legend(orient="bottom")),
            tooltip=["measure:N", "threshold:Q", "value:Q"],
        )
        .properties(height=300)
    )


def side_range(row: dict) -> str:
    """The title of a row of metrics.json's `by_size`."""
    return f"from {row['from']:.3g}" if row["to"] is None else f"{row['from']:.3g} to {row['to']:.3g}"


def sizes(by_size: list[dict]) -> alt.LayerChart:
    """AP by side of a square of the object's area."""
    rows = [
        {"side": side_range(row), "AP": row["AP"] if row["AP"] >= 0 else None, "boxes": row["boxes"]} for row in by_size
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        alt.X("side:N", sort=None, title="side in pixels", axis=alt.Axis(labelAngle=-35, labelOverlap=False)),
        _share(alt.Y, "AP", "AP"),
        tooltip=["side:N", alt.Tooltip("AP:Q", format=".3f"), "boxes:Q"],
    )
    text = base.mark_text(dy=-8, fontSize=12).encode(text=alt.Text("AP:Q", format=".3f"))
    return (base.mark_bar(color=BLUE) + text).properties(height=240)


def errors(analysis: Analysis) -> alt.LayerChart:
    """What AP50 would gain if one kind of error alone were mended, after TIDE."""
    told = analysis.counted.run.tide_errors(pos_thr=MATCH_IOU)
    rows = [
        {"error": title, "gain": max(told["delta_ap"][kind], 0.0), "count": told["counts"][kind]}
        for kind, title in TIDE_ERRORS.items()
    ]
    most = max(0.05, 1.3 * max(row["gain"] for row in rows))
    base = alt.Chart(alt.Data(values=rows)).encode(
        alt.X("gain:Q", title="AP50 gained if mended", scale=alt.Scale(domain=[0, most]), axis=alt.Axis(tickCount=4)),
        alt.Y("error:N", sort=None, title=None),
        tooltip=["error:N", alt.Tooltip("gain:Q", format=".4f"), "count:Q"],
    )
    text = base.mark_text(align="left", dx=5, fontSize=12).encode(text=alt.Text("gain:Q", format=".3f"))
    return (base.mark_bar(color=RED) + text).properties(height=32 * len(rows))


def confusion(analysis: Analysis) -> alt.Chart:
    """Shares of each class's boxes that were called so at IoU 0.5; of the classes that are confused most."""
    matrix, chosen = _matrix(analysis), _most_confused(analysis)
    names = [analysis.names[k] for k in chosen] + [NOTHING]
    part = matrix[np.ix_([*chosen, -1], [*chosen, -1])]
    total = np.maximum(matrix[[*chosen, -1]].sum(1, keepdims=True), 1)
    rows = [
        {"true": names[i], "called": names[j], "share": round(float(part[i, j] / total[i, 0]), 4), "boxes": int(n)}
        for (i, j), n in np.ndenumerate(part)
    ]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(stroke="white")
        .encode(
            alt.X("called:N", sort=names, title="called", axis=alt.Axis(labelAngle=-45, labelOverlap=False)),
            alt.Y("true:N", sort=names, title="there was", axis=alt.Axis(labelOverlap=False)),
            alt.Color("share:Q", scale=alt.Scale(range=["#f3f6f9", BLUE], domain=[0, 1]), legend=None),
            tooltip=["true:N", "called:N", alt.Tooltip("share:Q", format=".1%"), "boxes:Q"],
        )
        .properties(height=24 * len(names))
    )


def confused_pairs(analysis: Analysis) -> list[dict]:
    """The pairs of classes that are taken for one another most often: `true`, `called`, `boxes` and their share."""
    matrix = _matrix(analysis)
    wrong = matrix[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    rows = []
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[i, j]:
            row = {"true": analysis.names[i], "called": analysis.names[j], "boxes": int(wrong[i, j])}
            rows.append(row | {"share": float(wrong[i, j] / matrix[i].sum())})
    return rows


def _matrix(analysis: Analysis) -> np.ndarray:
    """[class, called], counts of boxes; the last of each is nothing. Detections from the report's threshold on."""
    run = analysis.counted.run
    return run.confusion_matrix(iou_thr=MATCH_IOU, min_score=analysis.threshold)["matrix"].astype(int)


def _most_confused(analysis: Analysis) -> list[int]:
    """Positions of classes, in their order; all of them where they are few."""
    matrix = _matrix(analysis)[:-1, :-1]
    if len(matrix) <= MOST_CONFUSED:
        return list(range(len(matrix)))
    wrong = matrix - np.diag(np.diag(matrix))
    often = wrong.sum(0) + wrong.sum(1)
    return sorted(np.argsort(-often, kind="stable")[:MOST_CONFUSED].tolist())


def calibration(analysis: Analysis) -> alt.LayerChart:
    """Share of right detections at IoU 0.5 by score; on the diagonal a score is what it claims."""
    told = analysis.counted.run.calibration(n_bins=10, iou_threshold=MATCH_IOU)
    rows = [
        {"from": b["bin_lower"], "to": b["bin_upper"], "right": b["avg_accuracy"], "detections": b["count"]}
        for b in told["bins"]
        if b["count"]
    ]
    bars = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=BLUE, stroke="white")
        .encode(
            alt.X("from:Q", bin="binned", title="score", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)),
            alt.X2("to:Q"),
            _share(alt.Y, "right", "share that is right"),
            tooltip=["from:Q", "to:Q", alt.Tooltip("right:Q", format=".3f"), "detections:Q"],
        )
    )
    ends: Any = alt.Data(values=[{"from": 0, "right": 0}, {"from": 1, "right": 1}])
    line = alt.Chart(ends).mark_line(color="#666", strokeDash=[4, 4]).encode(alt.X("from:Q"), alt.Y("right:Q"))
    return (bars + line).properties(height=280)


def _of_one_class(rows: list[dict], columns: list[str], along: str) -> alt.Chart:
    """A chart of rows whose `columns` hold 101 numbers, at 0, 0.01 .. 1 of `along`, of the class that is chosen."""
    names = list(dict.fromkeys(row["class"] for row in rows)) or [TOGETHER]
    chosen = alt.param(name="shown", value=names[0], bind=alt.binding_select(options=names, name="class "))
    return (
        alt.Chart(alt.Data(values=rows))
        .add_params(chosen)
        .transform_filter("datum.class == shown")
        .transform_calculate(**{along: "sequence(0, 101)"})
        .transform_flatten([*columns, along])
        .transform_calculate(**{along: f"datum.{along} / 100"})
    )


def _share(channel, name: str, title: str):
    """An axis from 0 to 1."""
    return channel(f"{name}:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5))


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(value, 3) if np.isfinite(value) else None for value in values.tolist()]

"""The comparison's charts, as Vega-Lite's descriptions."""

from collections.abc import Sequence

import altair as alt

from deperceiver_jax.compare.rows import Row, Run, learning_curves
from deperceiver_jax.report.charts import side_range


def all_charts(rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, dict]:
    """Vega-Lite's description of every chart, by the id of its place on the page."""
    charts = {"learning": learning(runs), "small": small_objects(rows), "sizes": sizes(runs)}
    return {name: chart.properties(width="container").to_dict() for name, chart in charts.items()}


def learning(runs: Sequence[Run]) -> alt.Chart:
    """AP, APs or the loss by epoch, images or hours of training."""
    lines = [line for run in runs for line in learning_curves(run)]
    rows = [
        {"run": line["run"], "measure": name, "value": line[name], **{a: line[a] for a in ("epoch", "images", "hours")}}
        for line in lines
        for name in ("AP", "APs", "loss")
        if name in line
    ]
    measure = alt.param(
        name="measure", value="AP", bind=alt.binding_select(options=["AP", "APs", "loss"], name="show ")
    )
    along = alt.param(
        name="along", value="epoch", bind=alt.binding_select(options=["epoch", "images", "hours"], name="by ")
    )
    return (
        alt.Chart(alt.Data(values=rows))
        .add_params(measure, along)
        .transform_filter("datum.measure == measure")
        .transform_calculate(position="datum[along]")
        .mark_line(point=True, strokeWidth=2)
        .encode(
            alt.X("position:Q", title=None),
            alt.Y("value:Q", title=None),
            alt.Color("run:N", title=None, legend=alt.Legend(orient="bottom", columns=2)),
            tooltip=["run:N", "epoch:Q", "images:Q", "hours:Q", "value:Q"],
        )
        .properties(height=300)
    )


def small_objects(rows: Sequence[Row]) -> alt.LayerChart:
    """APs/AP of every row: DePerceiver's figure 3."""
    rows = [row for row in rows if row.metrics.get("APs_over_AP", -1.0) >= 0]
    values = [
        {"row": _title(row), "APs/AP": row.metrics["APs_over_AP"], "kind": "published" if row.source else "measured"}
        for row in rows
    ]
    # Room for the number behind the longest bar.
    most = 1.15 * max([row.metrics["APs_over_AP"] for row in rows], default=1.0)
    base = alt.Chart(alt.Data(values=values)).encode(
        alt.X("APs/AP:Q", title="APs / AP", scale=alt.Scale(domain=[0, most], nice=False), axis=alt.Axis(tickCount=5)),
        alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelOverlap=False, labelLimit=360)),
    )
    colors = {"measured": "#2f6db3", "published": "#a9b4c0"}
    there = [kind for kind in colors if any(value["kind"] == kind for value in values)]
    colors = alt.Scale(domain=there, range=[colors[kind] for kind in there])
    bars = base.mark_bar().encode(alt.Color("kind:N", title=None, scale=colors, legend=alt.Legend(orient="bottom")))
    text = base.mark_text(align="left", dx=4, fontSize=12).encode(text=alt.Text("APs/AP:Q", format=".3f"))
    return (bars + text).properties(height=max(60, 26 * len(values)))


def _title(row: Row) -> str:
    return row.name if not row.source or row.epochs is None else f"{row.name}, {row.epochs} ep."


def sizes(runs: Sequence[Run]) -> alt.Chart:
    """AP by side of a square of the object's area."""
    rows = [
        {"run": run.name, "side": side_range(row), "AP": row["AP"]}
        for run in runs
        for row in run.metrics["by_size"]
        if row["AP"] >= 0
    ]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            alt.X("side:N", sort=None, title="side in pixels", axis=alt.Axis(labelAngle=-35, labelOverlap=False)),
            alt.XOffset("run:N", sort=None),
            alt.Y("AP:Q", scale=alt.Scale(domainMin=0), axis=alt.Axis(tickCount=5)),
            alt.Color("run:N", title=None, sort=None, legend=alt.Legend(orient="bottom", columns=2)),
            tooltip=["run:N", "side:N", alt.Tooltip("AP:Q", format=".3f")],
        )
        .properties(height=260)
    )

"""AP of every decoder layer, with and without non-maximum suppression: figure 4 of DETR's paper.

    deperceiver visualize layers --workdir=runs/x --output=layers.png

One forward pass gives the answers of all layers. The last row without suppression is what eval.py measures. A detector
that needs no suppression loses by it in its last layers, and gains in its first, which can't tell doubles yet.
"""

import functools

from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError, check_between
from deperceiver_jax.evaluation.evaluate import Answer
from deperceiver_jax.evaluation.layers import detections_of_layers, layer_metrics
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.visualize.charts import draw_chart, require_charts
from deperceiver_jax.visualize.flags import layers_flags as define_flags
from deperceiver_jax.visualize.output import save_picture
from deperceiver_jax.visualize.whole_split import answers, open_subject

SHOWN = ("AP", "AP50")
BLUE, ORANGE = "#2f6db3", "#d98a00"


def make_answer(config: ConfigDict) -> Answer:
    """Every layer's detections."""
    options = dict(classification=build_classification(config.loss), max_detections=config.eval.max_detections)
    return functools.partial(detections_of_layers, **options)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    check_between("--nms_iou", values.nms_iou, 0, 1)
    require_charts()
    subject = open_subject(values, config_arguments)
    if not subject.source.annotated:
        raise UserError("AP needs annotations, which this split does not have.")
    config = subject.loaded.config
    found = answers(subject.loaded, subject.source, make_answer, least_layers=2)
    metrics = layer_metrics(found, subject.source, config, values.nms_iou)
    print(table(metrics))
    subtitle = [subject.title]
    if not config.loss.auxiliary:
        subtitle.append("Layers before the last were not trained to answer (config.loss.auxiliary).")
    save_picture(draw_chart(chart(metrics, subtitle, values.nms_iou)), values.output)
    print(f"Wrote {values.output}: the answers of {len(metrics)} layers of {subject.stored.items}.")


def table(metrics: list[tuple[dict, dict]]) -> str:
    """A line a layer, the first one 0."""
    lines = ["layer  " + "".join(f"{name:>6}  with NMS  " for name in SHOWN).rstrip()]
    for layer, (alone, suppressed) in enumerate(metrics):
        cells = "".join(f"{alone[name]:6.3f}  {suppressed[name]:8.3f}  " for name in SHOWN)
        lines.append(f"{layer:5}  {cells}".rstrip())
    return "\n".join(lines)


def chart(metrics: list[tuple[dict, dict]], subtitle: list[str], iou: float):
    """AP and AP50 by layer, side by side: a line without suppression, and one with it."""
    import altair as alt

    kinds = ("without NMS", f"with NMS, IoU {iou:g}")
    rows = [
        {"layer": layer, "measure": name, "kind": kind, "value": of_kind[name]}
        for layer, pair in enumerate(metrics)
        for kind, of_kind in zip(kinds, pair, strict=True)
        for name in SHOWN
    ]
    colors = alt.Scale(domain=list(kinds), range=[BLUE, ORANGE])
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=60), strokeWidth=2.5)
        .encode(
            alt.X("layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0)),
            alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=6)),
            alt.Color("kind:N", title=None, scale=colors, legend=alt.Legend(orient="bottom")),
        )
        .properties(width=300, height=280)
        .facet(column=alt.Column("measure:N", title=None, header=alt.Header(labelFontSize=14)))
        .resolve_scale(y="independent")
        .properties(title=alt.TitleParams("AP by decoder layer", subtitle=subtitle, offset=12))
    )

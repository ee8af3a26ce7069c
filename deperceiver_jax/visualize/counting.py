"""How many objects of one class are found in one picture, far beyond the most of any training picture: a curve.

    deperceiver visualize counting --workdir=runs/demo --output=counting.png
    deperceiver visualize counting --workdir=runs/demo --label=star --counts=6,24,48 --output=counting.png

DETR's paper shows it one picture of 24 giraffes (figure 5), where no training picture has more than 13. Here are
pictures of the built-in data set, for detectors that were trained on it. An object is found by a detection of its class
with a score of at least --score_threshold that overlaps it by an IoU of 0.5; each detection finds one object.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.data.datasets.shapes.crowds import Crowds
from deperceiver_jax.errors import UserError, check_at_least, check_between, check_choice
from deperceiver_jax.evaluation.coco_metric import MATCH_IOU, coco_results, count, matches
from deperceiver_jax.evaluation.evaluate import Answer
from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize.charts import draw_chart, require_charts
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.flags import counting_flags as define_flags
from deperceiver_jax.visualize.fonts import font_for
from deperceiver_jax.visualize.output import INK, PAPER, check_output, need, save_picture
from deperceiver_jax.visualize.whole_split import answers

EXAMPLE = 24  # DETR's giraffes: the picture beside the curve has so many objects, or the nearest count that is drawn
BLUE, RED = "#2f6db3", "#c8452f"


class Counted(NamedTuple):
    """Means over the pictures with so many objects."""

    objects: int
    found: float
    least: int  # found in any of these pictures
    most: int
    wrong: float  # detections that found nothing


def make_answer(config: ConfigDict) -> Answer:
    """The last layer's detections, as eval.py has them."""
    options = dict(classification=build_classification(config.loss), max_detections=config.eval.max_detections)
    return functools.partial(postprocess, **options)


def parse_counts(texts: Sequence[str]) -> list[int]:
    """Ascending, each once. Raises UserError."""
    if not all(str(text).isdecimal() and int(text) for text in texts):
        raise UserError(f"--counts: {','.join(map(str, texts))} is not a list of whole numbers from 1, such as 6,24.")
    return sorted({int(text) for text in texts})


def most_in_training(loaded: LoadedDetector, label: int) -> int:
    """Objects of a class slot in the training picture that has the most. Raises UserError for another data set."""
    data = loaded.config.data
    if data.name.partition("/")[0] != "shapes":
        raise UserError(
            f"The detector was trained on {data.name}, and counting draws pictures of the built-in data set, shapes."
        )
    image, _, labels = open_source(data, data.train_split).all_targets()
    return int(np.bincount(image[labels == label], minlength=1).max())


def count_found(crowds: Crowds, detections: Detections, classes: ClassMap, threshold: float) -> list[Counted]:
    """A row a count; `detections` are of the pictures of `crowds`."""
    images = range(len(crowds))
    category = dict(zip(classes.slots, classes.category_ids, strict=True))
    annotations = []
    for i, picture in enumerate(crowds.pictures):
        for box, slot, area in zip(
            picture.boxes.tolist(), picture.labels.tolist(), picture.areas.tolist(), strict=True
        ):
            entry = {"image_id": i, "category_id": category[slot], "bbox": box, "area": area, "iscrowd": 0}
            annotations.append(entry)
    sizes = crowds.sizes.tolist()
    truth = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in zip(category.values(), classes.names, strict=True)],
    }
    results = coco_results(detections, images, classes, threshold)
    told = matches(count(truth, results, max_detections=max(len(results), 1)))
    of_object = np.array([annotation["image_id"] for annotation in annotations])
    of_detection = np.array([result["image_id"] for result in results], int)
    found = np.bincount(of_object[told.found_by >= 0], minlength=len(crowds))
    wrong = np.bincount(of_detection[~told.right], minlength=len(crowds))
    rows = []
    for objects in np.unique(crowds.counts).tolist():
        these = crowds.counts == objects
        least, most = int(found[these].min()), int(found[these].max())
        rows.append(Counted(objects, float(found[these].mean()), least, most, float(wrong[these].mean())))
    return rows


def chart(rows: list[Counted], most: int, label: str, subtitle: list[str]):
    """Found objects by objects; a dashed line is all of them, the grey field what training pictures have."""
    import altair as alt

    top = max(rows[-1].objects, max(row.wrong for row in rows), most)
    scale, across = alt.Scale(domain=[0, top], nice=False), f"objects in the picture, all of class {label}"

    def x(name):
        return alt.X(f"{name}:Q", title=across, scale=scale)

    def y(name):
        return alt.Y(f"{name}:Q", title="mean over the pictures", scale=scale)

    def data(values):
        return alt.Chart(alt.Data(values=values))

    kinds = ("found", "wrong detections")
    values = [
        {"objects": row.objects, "kind": kind, "value": value}
        for row in rows
        for kind, value in zip(kinds, (row.found, row.wrong), strict=True)
    ]
    field = data([{"low": 0, "high": most}]).mark_rect(color="#dee2e6", opacity=0.7).encode(x("low"), alt.X2("high"))
    word = data([{"high": most, "text": "as in training"}])
    word = word.mark_text(align="right", baseline="bottom", angle=270, dx=-6, dy=-4, color="#6c757d", fontSize=12)
    word = word.encode(x("high"), y=alt.value(0), text="text:N")
    ends = [{"objects": end, "value": end} for end in (0, rows[-1].objects)]
    all_found = data(ends).mark_line(strokeDash=[5, 4], color="#868e96").encode(x("objects"), y("value"))
    band = data([row._asdict() for row in rows]).mark_area(color=BLUE, opacity=0.18)
    band = band.encode(x("objects"), y("least"), alt.Y2("most"))
    colors = alt.Scale(domain=list(kinds), range=[BLUE, RED])
    lines = data(values).mark_line(point=alt.OverlayMarkDef(size=45), strokeWidth=2.5)
    lines = lines.encode(
        x("objects"), y("value"), alt.Color("kind:N", title=None, scale=colors, legend=alt.Legend(orient="bottom"))
    )
    title = alt.TitleParams("Objects found, by count", subtitle=subtitle, offset=12)
    return alt.layer(field, word, all_found, band, lines).properties(width=430, height=380, title=title)


def beside(left: Image.Image, right: Image.Image, caption: str) -> Image.Image:
    """The chart and the example, on one sheet."""
    margin, line = 32, 44
    height = max(left.height, right.height + line + 2 * margin)
    sheet = Image.new("RGB", (left.width + right.width + margin, height), PAPER)
    sheet.paste(left, (0, 0))
    top = (height - right.height + line) // 2
    sheet.paste(right, (left.width, top))
    ImageDraw.Draw(sheet).text((left.width, top - 14), caption, fill=INK, font=font_for(caption, 24), anchor="ls")
    return sheet


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    need(values, "output")
    check_output(values.output)
    check_at_least("--pictures", values.pictures, 1)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    check_choice("--label", values.label, drawing.CLASSES)
    counts = parse_counts(values.counts)
    require_charts()
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config, label = loaded.config, drawing.CLASSES.index(values.label)
    most = most_in_training(loaded, label)
    recipe = drawing.RECIPES[config.data.name.partition("/")[2] or "standard"]
    crowds = Crowds(recipe, label, counts, values.pictures)
    config.data.max_boxes = 0  # as many as the fullest crowd has

    found = answers(loaded, crowds, make_answer)
    rows = count_found(crowds, found, loaded.classes, values.score_threshold)
    print("objects  found  wrong detections")
    for row in rows:
        print(f"{row.objects:7}  {row.found:5.1f}  {row.wrong:16.1f}")
    queries, name = config.model.num_queries, config.model.name
    subtitle = [
        f"{name} with {queries} queries; detections of {values.score_threshold:g} or more, at IoU {MATCH_IOU:g}.",
        f"The band: from the worst of {values.pictures} pictures to the best. The fullest in training has {most}.",
    ]
    drawn = draw_chart(chart(rows, most, values.label, subtitle))
    example = int(np.abs(crowds.counts - EXAMPLE).argmin())
    kept = found.scores[example] >= values.score_threshold
    boxes, labels, scores = (part[example][kept] for part in (found.boxes, found.labels, found.scores))
    side = round(0.62 * drawn.width)
    image = crowds.pictures[example].image
    picture = draw_detections(image, boxes, labels, scores, lambda slot: "", long_side=side)
    caption = f"one with {crowds.counts[example]}, and {int(kept.sum())} detections"
    save_picture(beside(drawn, Image.fromarray(picture), caption), values.output)
    print(f"Wrote {values.output}: up to {rows[-1].objects} objects of class {values.label} for {stored.items}.")

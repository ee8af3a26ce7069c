"""Sheets of ground truth beside detections, from what an evaluated run has written.

    deperceiver visualize detections --workdir=runs/demo --output=runs/demo/detections.png

What it draws is read from the run's last `eval/<step>`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from deperceiver_jax.data import open_source
from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.errors import check_at_least, check_between
from deperceiver_jax.files import as_path, require_readable
from deperceiver_jax.program.command_line import parse_config, parse_flags
from deperceiver_jax.runs.stored_evaluation import newest_evaluation, read_json, require_evaluated
from deperceiver_jax.runs.workdir import CONFIG, read_config
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.flags import detections_flags as define_flags
from deperceiver_jax.visualize.fonts import font_for, readable
from deperceiver_jax.visualize.output import FAINT, INK, MOUNT, PAPER, check_output, need, save_picture


class Comparison(NamedTuple):
    """One held-out image: what is in it and what was found. Boxes are xyxy in pixels of `image`."""

    image: UInt8[np.ndarray, "H W 3"]
    true_boxes: Float[np.ndarray, "N 4"]
    true_labels: Int[np.ndarray, " N"]
    boxes: Float[np.ndarray, "K 4"]
    labels: Int[np.ndarray, " K"]
    scores: Float[np.ndarray, " K"]


def save_comparison(
    path: str | Path,
    rows: Sequence[Comparison],
    name_of: Callable[[int], str],
    *,
    title: str,
    note: str = "",
    cell: int = 400,
) -> None:
    """Writes a sheet with two pairs a line, each pair "ground truth | detections" of one image, under a title.

    cell: longest side of every image on the sheet, in pixels.
    """
    pairs = min(2, len(rows))
    lines = math.ceil(len(rows) / pairs)
    gap, gutter, head, foot = 6, 28, 104, 20
    pair_width = 2 * cell + gap
    drawn = []
    for row in rows:
        left = draw_detections(row.image, row.true_boxes, row.true_labels, None, name_of, long_side=cell)
        right = draw_detections(row.image, row.boxes, row.labels, row.scores, name_of, long_side=cell)
        drawn.append((left, right))
    heights = [max(left.shape[0] for left, _ in drawn[i * pairs : (i + 1) * pairs]) for i in range(lines)]
    width = 2 * foot + pairs * pair_width + (pairs - 1) * gutter
    sheet = Image.new("RGB", (width, head + sum(heights) + (lines - 1) * gutter // 2 + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((foot, 18), title, fill=INK, font=font_for(title, 26))
    draw.text((foot, 52), note, fill=FAINT, font=font_for(note, 16))
    for pair in range(pairs):
        x = foot + pair * (pair_width + gutter)
        for text, start in (("ground truth", x), ("detections", x + cell + gap)):
            draw.text((start, head - 8), text, fill=INK, font=ImageFont.load_default(16), anchor="ls")
    y = head
    for i, height in enumerate(heights):
        for pair, (left, right) in enumerate(drawn[i * pairs : (i + 1) * pairs]):
            x = foot + pair * (pair_width + gutter)
            for start, picture in ((x, left), (x + cell + gap, right)):
                draw.rectangle((start, y, start + cell - 1, y + height - 1), fill=MOUNT)
                spare = cell - picture.shape[1], height - picture.shape[0]
                sheet.paste(Image.fromarray(picture), (start + spare[0] // 2, y + spare[1] // 2))
        y += height + gutter // 2
    save_picture(sheet, path)


def compare(source, results: list[dict], positions: Iterable[int], score_threshold: float) -> list[Comparison]:
    """Images of a split with their targets, and the detections that `results` (COCO's format) has for them."""
    slots = dict(zip(source.classes.category_ids, source.classes.slots, strict=True))
    rows = []
    for i in positions:
        found = [r for r in results if r["image_id"] == source.image_ids[i] and r["score"] >= score_threshold]
        boxes = np.array([r["bbox"] for r in found]).reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        labels = np.array([slots[r["category_id"]] for r in found], int)
        image = decode_image(source.image_bytes(i), source.orientation(i))
        targets, target_labels = source.targets(i)
        scores = np.array([r["score"] for r in found])
        rows.append(Comparison(image, targets, target_labels, boxes, labels, scores))
    return rows


def drawn_images(source, results: list[dict], count: int = 4) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """{file name: picture with detections that score 0.3 or more}, of `count` images spread evenly over a split."""
    positions = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist()
    return {
        source.filename(i): draw_detections(row.image, row.boxes, row.labels, row.scores, source.classes.name)
        for i, row in zip(positions, compare(source, results, positions, 0.3), strict=True)
    }


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    need(values, "workdir", "output")
    check_output(values.output)
    check_at_least("--images", values.images, 1)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    workdir = as_path(values.workdir)
    require_readable("--workdir", workdir)
    config = parse_config(config_arguments, read_config(workdir / CONFIG))
    evaluation = newest_evaluation(workdir)
    metrics, results = (read_json(evaluation / name) for name in ("metrics.json", "detections.json"))

    source = open_source(config.data, config.data.eval_split)
    require_evaluated(evaluation, source)
    positions = np.linspace(0, len(source) - 1, min(values.images, len(source))).round().astype(int)
    rows = compare(source, results, positions, values.score_threshold)
    title = f"{config.model.name} on {config.data.name}, {config.data.eval_split} images"
    note = f"step {evaluation.name}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}, APs {metrics['APs']:.3f} on "
    note += f"{len(source)} images; drawn are detections with a score of at least {values.score_threshold:g}"
    save_comparison(values.output, rows, readable(source.classes), title=title, note=note)
    print(f"Wrote {values.output}.")

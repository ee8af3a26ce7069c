"""Pictures of detections: boxes with class names and scores, and sheets of ground truth beside detections.

    python -m deperceiver_jax.visualize detections --workdir=runs/demo --output=runs/demo/detections.png

draws held-out images of an evaluated run; what it draws is read from the run's newest `eval/<step>`.
"""

import colorsys
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from deperceiver_jax.command_line import parse_config, parse_flags, run
from deperceiver_jax.data import open_source
from deperceiver_jax.data.pixels import decode_image
from deperceiver_jax.errors import UserError
from deperceiver_jax.training.workdir import CONFIG, read_config

READABLE_SIDE = 512  # an image with a shorter long side is enlarged to it before anything is drawn
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many there are
_PAPER, _MOUNT, _FAINT, _INK = (255, 255, 255), (233, 236, 239), (108, 117, 125), (33, 37, 41)


class Comparison(NamedTuple):
    """One held-out image: what is in it and what was found. Boxes are xyxy in pixels of `image`."""

    image: UInt8[np.ndarray, "H W 3"]
    true_boxes: Float[np.ndarray, "N 4"]
    true_labels: Int[np.ndarray, " N"]
    boxes: Float[np.ndarray, "K 4"]
    labels: Int[np.ndarray, " K"]
    scores: Float[np.ndarray, " K"]


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class slot: always the same one, and far from its neighbours'."""
    hue = (0.02 + label * _GOLDEN_RATIO) % 1.0
    lightness = (0.50, 0.62, 0.40)[label // 8 % 3]  # after 8 hues the next lie between them, so they also differ here
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: UInt8[np.ndarray, "H W 3"],
    boxes: Float[np.ndarray, "K 4"],
    labels: Int[np.ndarray, " K"],
    scores: Float[np.ndarray, " K"] | None,
    name_of: Callable[[int], str],
    *,
    long_side: int | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """A copy of an RGB image with its boxes drawn, the best score on top, and every label wholly inside the picture.

    boxes: xyxy in pixels of `image`; what lies outside the image is not drawn. name_of: class slot -> name.
    scores: None for ground truth, whose labels are names alone.
    long_side: of the picture; by default the image's own, or READABLE_SIDE where that is more.
    """
    height, width = image.shape[:2]
    target = long_side or max(height, width, READABLE_SIDE)
    scale = target / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(target / 320))
    font = ImageFont.load_default(max(12, round(target / 56)))

    order = range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    limit = np.array([size[0] - 1, size[1] - 1] * 2)
    placed = []  # (label's rectangle, text, colour), best first
    for k in order:
        box = np.clip(np.asarray(boxes[k]) * scale, 0, limit).round().astype(int).tolist()
        name = name_of(int(labels[k]))
        text = name if scores is None else f"{name} {scores[k]:.2f}"
        text, extent = _fit(text, font, size[0])
        placed.append((_place(box, extent, size, line, [p[0] for p in placed]), text, box, class_color(int(labels[k]))))
    for _, _, (left, top, right, bottom), color in reversed(placed):
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_PAPER)  # so it is seen on any ground
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
    for rectangle, text, _, color in reversed(placed):
        draw.rectangle(rectangle, fill=color, outline=tuple(c * 7 // 10 for c in color))
        luminance = np.dot(color, (0.299, 0.587, 0.114))
        ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
        draw.text((rectangle[0] + 3, (rectangle[1] + rectangle[3]) / 2), text, fill=ink, font=font, anchor="lm")
    return np.asarray(picture)


def _fit(text: str, font, width: int) -> tuple[str, tuple[int, int]]:
    """The text, shortened to fit into a picture of this width, and the (width, height) of its label."""
    height = sum(font.getmetrics())
    shown = text
    while len(text) > 1 and font.getlength(shown) + 6 > width:
        text = text[:-1]
        shown = text + "."
    return shown, (math.ceil(font.getlength(shown)) + 6, height)


def _place(box: list[int], extent: tuple[int, int], size: tuple[int, int], line: int, taken: list) -> tuple:
    """Where a label goes: the first place at its box that is free of other labels, or else the least covered one."""
    (left, top, right, bottom), (wide, high) = box, extent
    corners = [(left, top - high), (left, bottom), (right - wide, top - high), (right - wide, bottom)]
    corners += [(left + line, top + line), (left + line, bottom - high - line)]
    best, least = None, math.inf
    for x, y in corners:
        x = max(0, min(x, size[0] - wide))
        inside = max(0, min(y, size[1] - high))
        rectangle = (x, inside, min(x + wide, size[0]) - 1, min(inside + high, size[1]) - 1)
        cost = sum(_shared_area(rectangle, other) for other in taken) + 0.5 * wide * abs(inside - y)
        if cost < least:
            best, least = rectangle, cost
        if cost == 0:
            break
    return best


def _shared_area(a, b) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    return max(width, 0) * max(height, 0)


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
    sheet = Image.new("RGB", (width, head + sum(heights) + (lines - 1) * gutter // 2 + foot), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((foot, 18), title, fill=_INK, font=ImageFont.load_default(26))
    draw.text((foot, 52), note, fill=_FAINT, font=ImageFont.load_default(16))
    for pair in range(pairs):
        x = foot + pair * (pair_width + gutter)
        for text, start in (("ground truth", x), ("detections", x + cell + gap)):
            draw.text((start, head - 8), text, fill=_INK, font=ImageFont.load_default(16), anchor="ls")
    y = head
    for i, height in enumerate(heights):
        for pair, (left, right) in enumerate(drawn[i * pairs : (i + 1) * pairs]):
            x = foot + pair * (pair_width + gutter)
            for start, picture in ((x, left), (x + cell + gap, right)):
                draw.rectangle((start, y, start + cell - 1, y + height - 1), fill=_MOUNT)
                spare = cell - picture.shape[1], height - picture.shape[0]
                sheet.paste(Image.fromarray(picture), (start + spare[0] // 2, y + spare[1] // 2))
        y += height + gutter // 2
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def newest_evaluation(workdir: Path) -> Path:
    """The directory of the run's latest evaluation. Raises UserError when it has none."""
    done = [path.parent for path in (workdir / "eval").glob("*/metrics.json")]
    if not done:
        raise UserError(f"{workdir} has no evaluation; make one with: python eval.py --workdir={workdir}.")
    return max(done, key=lambda path: (path.name.isdigit() and int(path.name), path.name))


def compare(source, results: list[dict], positions: Sequence[int], score_threshold: float) -> list[Comparison]:
    """Images of a split with their targets, and the detections that `results` (COCO's format) has for them."""
    slots = dict(zip(source.classes.category_ids, source.classes.slots, strict=True))
    rows = []
    for i in positions:
        found = [r for r in results if r["image_id"] == source.image_ids[i] and r["score"] >= score_threshold]
        boxes = np.array([r["bbox"] for r in found]).reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        labels = np.array([slots[r["category_id"]] for r in found], int)
        image = decode_image(source.image_bytes(i))
        rows.append(Comparison(image, *source.targets(i), boxes, labels, np.array([r["score"] for r in found])))
    return rows


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "An evaluated run.", flag_values=values)
    flags.DEFINE_string("output", None, "The picture to write, a .png or .jpg.", flag_values=values)
    flags.DEFINE_integer("images", 8, "How many images, taken evenly from the split.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)


def main(argv: list[str]) -> None:
    command, argv = argv[1:2], [argv[0], *argv[2:]]
    if command != ["detections"]:
        raise UserError("python -m deperceiver_jax.visualize draws: detections --workdir=... --output=...")
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    for name in ("workdir", "output"):
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")
    if not values.output.lower().endswith((".png", ".jpg")):
        raise UserError(f"--output: {values.output} must end in .png or .jpg.")
    workdir = Path(values.workdir).expanduser()
    config = parse_config(config_arguments, read_config(workdir / CONFIG))
    evaluation = newest_evaluation(workdir)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    results = json.loads((evaluation / "detections.json").read_text())

    source = open_source(config.data, config.data.eval_split)
    positions = np.linspace(0, len(source) - 1, min(values.images, len(source))).round().astype(int)
    rows = compare(source, results, positions, values.score_threshold)
    title = f"{config.model.name} on {config.data.name}, {config.data.eval_split} images"
    note = f"step {evaluation.name}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}, APs {metrics['APs']:.3f} on "
    note += f"{len(source)} images; drawn are detections with a score of at least {values.score_threshold:g}"
    save_comparison(values.output, rows, source.classes.name, title=title, note=note)
    print(f"Wrote {values.output}.")


if __name__ == "__main__":
    sys.exit(run(main))

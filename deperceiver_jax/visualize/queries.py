"""What each query slot has learned: every box that it predicts over a data set, as in figure 7 of DETR's paper.

    deperceiver visualize queries --workdir=runs/x --output=queries.png
    deperceiver visualize queries --weights=DIR --queries=3,17,40 --images=500 --output=queries.png

A square for each slot is every image at once; a dot is the centre of the slot's box in one of them. Its colour is the
box's size and shape: green is small, red large and wide, blue large and tall, violet large and square.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from deperceiver_jax.errors import UserError, check_at_least, check_between
from deperceiver_jax.evaluation.evaluate import Answer
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.structures import Detections, Predictions
from deperceiver_jax.visualize.attention import parse_queries
from deperceiver_jax.visualize.flags import queries_flags as define_flags
from deperceiver_jax.visualize.fonts import font_for
from deperceiver_jax.visualize.output import FAINT, INK, PAPER, save_picture, wrap
from deperceiver_jax.visualize.whole_split import answers, open_subject

SMALL, WIDE, TALL = (45, 165, 75), (220, 50, 47), (38, 90, 220)
LARGE_SIDE = 0.5  # of a square that is as much of the image as a box whose colour says nothing of small
CELL, COLUMNS, GAP, MARGIN, CAPTION = 200, 5, 14, 20, 22  # pixels
SURE = 0.5  # score from which on a slot has an object, in the captions
ENLARGED = 2  # drawn larger and shrunk, for smooth dots


def answers_of_slots(predictions: Predictions, original_size: Int32[Array, "B 2"], *, classification) -> Detections:
    """The last layer's box of every query, cxcywh in [0, 1], with its best class, in the order of the queries."""
    del original_size
    scores = classification.scores(predictions.logits[-1])
    labels = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return Detections(jnp.max(scores, axis=-1), labels, predictions.boxes[-1].astype(jnp.float32))


def make_answer(config: ConfigDict) -> Answer:
    return functools.partial(answers_of_slots, classification=build_classification(config.loss))


def box_colors(boxes: Float[np.ndarray, "N 4"], sizes: Int32[np.ndarray, "N 2"]) -> UInt8[np.ndarray, "N 3"]:
    """Of boxes cxcywh in [0, 1] of images with these (height, width)."""
    share = np.sqrt(np.clip(boxes[:, 2] * boxes[:, 3], 0, None)) / LARGE_SIDE
    large = np.clip(share, 0, 1)[:, None]
    wide, tall = boxes[:, 2] * sizes[:, 1], boxes[:, 3] * sizes[:, 0]
    # 0: twice as tall as wide or more; 1: the other way round.
    shape = np.clip(np.log2(np.maximum(wide, 1e-6) / np.maximum(tall, 1e-6)) / 2 + 0.5, 0, 1)[:, None]
    of_large = shape * np.array(WIDE) + (1 - shape) * np.array(TALL)
    return (large * of_large + (1 - large) * np.array(SMALL)).round().astype(np.uint8)


def draw_slot(
    boxes: Float[np.ndarray, "N 4"], colors: UInt8[np.ndarray, "N 3"], side: int = CELL
) -> UInt8[np.ndarray, "side side 3"]:
    """One slot's square: a dot for each box; small boxes lie on top of large ones."""
    length = side * ENLARGED
    square = Image.new("RGB", (length, length), (248, 249, 250))
    draw = ImageDraw.Draw(square)
    radius = ENLARGED * float(np.clip(40 / np.sqrt(max(len(boxes), 1)), 0.9, 2.6))
    for k in np.argsort(-boxes[:, 2] * boxes[:, 3], kind="stable"):
        x, y = boxes[k, :2] * length
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colors[k].tolist()))
    draw.rectangle((0, 0, length - 1, length - 1), outline=(173, 181, 189), width=ENLARGED)
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def draw_slots(
    found: Detections, sizes: Int32[np.ndarray, "N 2"], chosen: list[int], threshold: float, title: str, note: str
) -> Image.Image:
    """A sheet with the squares of the chosen slots. found: an image a row, a slot a column; sizes: of the images."""
    columns = min(COLUMNS, len(chosen))
    width = max(2 * MARGIN + columns * (CELL + GAP) - GAP, 560)
    body, small = ImageFont.load_default(15), ImageFont.load_default(14)
    lines = wrap(note, body, width - 2 * MARGIN)
    head = 56 + 20 * len(lines) + 34
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (width, head + rows * (CELL + CAPTION + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 14), title, fill=INK, font=font_for(title, 22))
    for i, line in enumerate(lines):
        draw.text((MARGIN, 48 + 20 * i), line, fill=FAINT, font=body)
    x, y = MARGIN, head - 26
    mixed = tuple((a + b) // 2 for a, b in zip(WIDE, TALL, strict=True))
    for color, text in ((SMALL, "small"), (WIDE, "large, wide"), (mixed, "large, square"), (TALL, "large, tall")):
        draw.ellipse((x, y + 3, x + 11, y + 14), fill=color)
        draw.text((x + 17, y + 9), text, fill=INK, font=small, anchor="lm")
        x += 17 + round(small.getlength(text)) + 22
    for i, slot in enumerate(chosen):
        left, top = MARGIN + i % columns * (CELL + GAP), head + i // columns * (CELL + CAPTION + GAP)
        kept = found.scores[:, slot] >= threshold
        boxes = found.boxes[kept, slot]
        sure = np.mean(found.scores[:, slot] >= SURE)
        draw.text((left, top + CAPTION - 6), f"slot {slot}: sure in {sure:.0%}", fill=INK, font=small, anchor="ls")
        sheet.paste(Image.fromarray(draw_slot(boxes, box_colors(boxes, sizes[kept]))), (left, top + CAPTION))
    return sheet


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    check_at_least("--slots", values.slots, 1)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    chosen = parse_queries(values.queries)
    subject = open_subject(values, config_arguments)
    count = subject.loaded.config.model.num_queries
    for query in chosen or []:
        if not 0 <= query < count:
            raise UserError(f"--queries: the detector has the queries 0 to {count - 1}, not {query}.")
    if chosen is None:
        chosen = np.linspace(0, count - 1, min(values.slots, count)).round().astype(int).tolist()
    found = answers(subject.loaded, subject.source, make_answer)
    note = (
        f"A dot is the centre of a slot's box in one image; sure: the share of images with a score of {SURE:g} or more."
    )
    if values.score_threshold:
        note += f" Boxes with scores below {values.score_threshold:g} are left out."
    if from_proposals(subject.loaded.config.model):
        note += " Queries of this detector start from an image's best proposals, so a slot is a rank among these."
    sheet = draw_slots(found, subject.source.sizes, chosen, values.score_threshold, f"Slots of {subject.title}", note)
    save_picture(sheet, values.output)
    print(f"Wrote {values.output}: {len(chosen)} of {count} slots of {subject.stored.items}.")


def from_proposals(model: ConfigDict) -> bool:
    """Whether queries are an image's best proposals (two-stage Deformable DETR, DePerceiver+)."""
    return bool(model.get("two_stage", False)) or model.get("start", "") == "proposals"

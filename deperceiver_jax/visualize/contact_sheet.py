"""One picture with training images as the loader makes them, augmented and with their boxes, class by class."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from deperceiver_jax.data import Source, TrainBatches
from deperceiver_jax.structures import Batch
from deperceiver_jax.visualize.draw_boxes import class_color
from deperceiver_jax.visualize.fonts import font_for

TILE, GAP, HEADER = 224, 6, 26  # pixels
TILES = 120  # at most
ACROSS = 6  # tiles
TRIES = 4  # epochs, in which a picture may be drawn with a box of its class left
_GROUND, _INK, _FAINT = (224, 224, 224), (20, 20, 20), (90, 90, 90)


def contact_sheet(
    source: Source, config_data: ConfigDict, name_of: Callable[[int], str], *, seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Up to ACROSS images of each class that has boxes, fewer where there are many classes, the commonest class first.

    config_data: config.data, whose augmentation is drawn from `seed`. Boxes of the row's class are thick, others thin.
    """
    wanted = _examples(source, seed)
    shown = _load(source, config_data, wanted, seed)
    each = max(len(positions) for positions in wanted.values())
    blocks = ACROSS // each
    width = blocks * (each * (TILE + GAP) + GAP) + GAP
    height = math.ceil(len(wanted) / blocks) * (TILE + GAP + HEADER) + GAP
    sheet = Image.new("RGB", (width, height), _GROUND)
    counts = np.bincount(source.all_targets()[2], minlength=source.classes.num_slots)
    for place, (label, positions) in enumerate(wanted.items()):
        row, block = divmod(place, blocks)
        left, top = GAP + block * (each * (TILE + GAP) + GAP), GAP + row * (TILE + GAP + HEADER)
        _write(
            sheet, left, top, each * TILE, name_of(label), f"{counts[label]} {'box' if counts[label] == 1 else 'boxes'}"
        )
        for k, position in enumerate(positions):
            tile = _tile(shown[position, label], label)
            corner = left + k * (TILE + GAP) + (TILE - tile.width) // 2, top + HEADER + (TILE - tile.height) // 2
            sheet.paste(tile, corner)
    return np.asarray(sheet)


def _examples(source, seed):
    """{class slot: positions of images with it}, the commonest first, drawn without regard to what else they have."""
    image, _, labels = source.all_targets()
    slots = np.argsort(-np.bincount(labels, minlength=source.classes.num_slots), kind="stable")
    slots = [int(slot) for slot in slots if (labels == slot).any()][:TILES]
    each = next(count for count in (6, 3, 2, 1) if count * len(slots) <= TILES)
    draw = np.random.default_rng(seed)
    found = {}
    for slot in slots:
        images = np.unique(image[labels == slot])
        found[slot] = sorted(draw.choice(images, min(each, len(images)), replace=False).tolist())
    return found


def _load(source, config_data, wanted, seed):
    """{(position, class slot): (pixels, xyxy boxes in pixels, class slots)}, if it can be with a box of the class."""
    size = min(config_data.batch_size, len(source))
    chosen = sorted({position for positions in wanted.values() for position in positions})
    known = set(chosen)
    others = (position for position in range(len(source)) if position not in known)
    chosen = sorted([*chosen, *(next(others) for _ in range(size - len(chosen)))])  # a batch must be full
    data = ConfigDict(config_data.to_dict())
    data.update(batch_size=size, num_workers=0, buckets=1)
    batches = TrainBatches(source.take(np.array(chosen)), data, seed=seed)
    pairs = {(position, label) for label, positions in wanted.items() for position in positions}
    found, kept = {}, set()
    stream = iter(batches)
    for _ in range(TRIES * batches.steps_per_epoch + TRIES):
        batch = next(stream)
        for row, example in enumerate(batch.example.tolist()):
            drawn = _row(batch, row)
            for pair in (pair for pair in pairs - kept if pair[0] == chosen[example]):
                found[pair] = drawn
                if pair[1] in drawn[2]:
                    kept.add(pair)
        if kept == pairs:
            break
    return found


def _row(batch: Batch, row: int):
    height, width = batch.size[row].tolist()
    valid = batch.box_valid[row]
    center, size = batch.boxes[row, valid, :2], batch.boxes[row, valid, 2:]
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1) * [width, height, width, height]
    return batch.image[row, :height, :width].copy(), boxes, batch.labels[row, valid]


def _tile(drawn, label):
    pixels, boxes, labels = drawn
    scale = TILE / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    tile = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(tile)
    for k in np.argsort(labels == label, kind="stable"):  # the row's class on top
        own = labels[k] == label
        left, top, right, bottom = np.clip(boxes[k] * scale, 0, np.array([*size, *size]) - 1).round().tolist()
        if own:
            draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(255, 255, 255))
        draw.rectangle((left, top, right, bottom), outline=class_color(int(labels[k])), width=2 if own else 1)
    return tile


def _write(sheet, left, top, room, name, count):
    draw = ImageDraw.Draw(sheet)
    font, small = font_for(name, 16), font_for(count, 13)
    while len(name) > 1 and font.getlength(name) + small.getlength(count) + 12 > room:
        name = name.rstrip("…")[:-1] + "…"
    draw.text((left, top + HEADER / 2), name, fill=_INK, font=font, anchor="lm")
    draw.text((left + font.getlength(name) + 10, top + HEADER / 2 + 1), count, fill=_FAINT, font=small, anchor="lm")

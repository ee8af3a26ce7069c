"""Where a detector's latents sit in one image, and how they move from layer to layer.

    deperceiver visualize latents --workdir=runs/x --example=0 --output=latents.png
    deperceiver visualize latents --weights=DIR --image=photo.jpg --score_threshold=0.4 --output=a.png

A picture for each decoder layer, and one before them for the proposals that the latents start from, where there are
any. Every dot is the centre of the box that a latent (a query, in other detectors) answers with there, with a tail to
where it was a layer before: coloured with its box where the last layer is sure of an object, dark where it is not.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from deperceiver_jax.boxes import box_cxcywh_to_xyxy
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import check_between
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.structures import Predictions
from deperceiver_jax.visualize.draw_boxes import class_color
from deperceiver_jax.visualize.flags import latents_flags as define_flags
from deperceiver_jax.visualize.fonts import fitting
from deperceiver_jax.visualize.one_image import check_image_flags, read_image, see
from deperceiver_jax.visualize.output import FAINT, INK, PAPER, save_picture

CELL = 420  # longest side of each picture, in pixels
COLUMNS = 4
NARROWEST = 130  # pixels between pictures, for their captions


class Movement(NamedTuple):
    """The boxes of all latents, from layer to layer."""

    names: list[str]  # of the layers
    boxes: Float[np.ndarray, "L Q 4"]  # cxcywh in [0, 1]
    labels: Int[np.ndarray, " Q"]  # class slot, by the last layer
    scores: Float[np.ndarray, " Q"]


def follow(predictions: Predictions, classes: ClassMap, scores: Float[np.ndarray, "Q C"]) -> Movement:
    """Movement in the one image of `predictions`; `scores` are those of its last layer."""
    boxes = np.asarray(predictions.boxes[:, 0])
    names = [f"layer {i}" for i in range(len(boxes))]
    if predictions.proposals is not None:
        of_tokens = np.asarray(predictions.proposals.boxes[0, 0])
        _, best = jax.lax.top_k(predictions.proposals.logits[0, 0, :, 0], boxes.shape[1])
        boxes = np.concatenate([of_tokens[np.asarray(best)][None], boxes])
        names = ["proposals", *names]
    scores = scores[:, list(classes.slots)]
    return Movement(names, boxes, np.asarray(classes.slots)[scores.argmax(axis=1)], scores.max(axis=1))


def draw_layer(
    image: UInt8[np.ndarray, "H W 3"], movement: Movement, layer: int, threshold: float, *, long_side: int = CELL
) -> UInt8[np.ndarray, "h w 3"]:
    """The image, paler, with the dots and boxes of one layer."""
    scale = long_side / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    pale = (image.astype(np.float32) * 0.6 + 255 * 0.4).astype(np.uint8)
    picture = Image.fromarray(pale).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    corners = np.asarray(box_cxcywh_to_xyxy(jnp.asarray(movement.boxes))) * np.array([*size, *size])
    centers = movement.boxes[..., :2] * np.array(size)
    for k in np.argsort(movement.scores, kind="stable"):  # the surest on top
        sure = movement.scores[k] >= threshold
        color = class_color(int(movement.labels[k])) if sure else (73, 80, 87)
        if sure:
            draw.rectangle(tuple(np.clip(corners[layer, k], -1, [*size, *size])), outline=color, width=2)
        if layer > 0:
            draw.line((*centers[layer - 1, k], *centers[layer, k]), fill=color, width=2 if sure else 1)
        x, y = centers[layer, k]
        radius = 4 if sure else 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=(255, 255, 255))
    return np.asarray(picture)


def save_movement(path: str, image: UInt8[np.ndarray, "H W 3"], movement: Movement, threshold: float, title: str):
    """A sheet with a picture for each layer."""
    pictures = [draw_layer(image, movement, layer, threshold) for layer in range(len(movement.names))]
    height, width = pictures[0].shape[:2]
    width = max(width, NARROWEST)
    columns, gap, head, line = min(COLUMNS, len(pictures)), 14, 62, 24
    rows = -(-len(pictures) // columns)
    whole = max(gap + columns * (width + gap), 560)
    sheet = Image.new("RGB", (whole, head + rows * (height + line + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 10), title, fill=INK, font=fitting(title, 22, whole - 2 * gap))
    found = f"{int(np.sum(movement.scores >= threshold))} of {len(movement.scores)} answer for an object with a score"
    draw.text((gap, 38), f"{found} of at least {threshold:g}", fill=FAINT, font=ImageFont.load_default(14))
    for i, (name, picture) in enumerate(zip(movement.names, pictures, strict=True)):
        x, y = gap + i % columns * (width + gap), head + i // columns * (height + line + gap)
        draw.text((x, y + 18), name, fill=INK, font=ImageFont.load_default(15), anchor="ls")
        sheet.paste(Image.fromarray(picture), (x, y + line))
    save_picture(sheet, path)


def predict(loaded: LoadedDetector, frame: UInt8[np.ndarray, "H W 3"]) -> Predictions:
    """The detector's answers to one image without padding."""

    def forward(arrays, image):
        size = jnp.asarray([image.shape[1:3]], jnp.int32)
        return loaded.skeleton.merge(arrays)(*normalize_images(image, size))

    return jax.device_get(jax.jit(forward)(loaded.arrays, frame[None]))


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    check_image_flags(values)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    _, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    image, name = read_image(values, loaded.config)
    keep_compiled(loaded.config.train.compilation_cache)
    predictions = predict(loaded, see(image, loaded.config.data))
    scores = np.asarray(build_classification(loaded.config.loss).scores(predictions.logits[-1]))[0]
    movement = follow(predictions, loaded.classes, scores)
    title = f"Latents of {loaded.config.model.name} in {Path(name).name}"
    save_movement(values.output, image, movement, values.score_threshold, title)
    print(f"Wrote {values.output}: {len(scores)} latents in {len(movement.names)} layers.")

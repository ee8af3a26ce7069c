"""Where the encoder's tokens look: self-attention of chosen points of one image, as in figure 3 of DETR's paper.

    deperceiver visualize encoder --workdir=runs/x --image=photo.jpg --points 120,80 300,200 --output=encoder.png
    deperceiver visualize encoder --weights=DIR --example=5 --layer=0 --output=encoder.png

Points are x,y in pixels of the image; without them, the centres of the best detections. A panel for each is the
attention of the token there, the mean of its heads; of Deformable DETR it shows the places that the token reads.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from deperceiver_jax.errors import UserError
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.models.layers.recorder import DenseRecord, PointRecord, record_attention
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.visualize.attention import choose_queries
from deperceiver_jax.visualize.attention_maps import COLUMNS, Frame, Panel, View, draw_heat, draw_points, fold, spread
from deperceiver_jax.visualize.attention_sheet import save_sheet
from deperceiver_jax.visualize.flags import encoder_flags as define_flags
from deperceiver_jax.visualize.fonts import font_for
from deperceiver_jax.visualize.latents import predict
from deperceiver_jax.visualize.one_image import check_image_flags, read_image, see

SELF_ATTENTION = re.compile(r"encoder\.layers\.(\d+)\.attentions?(?:\.|$)")
POINTS = 4  # that are chosen where none are given
SIDE = 260  # long side of a point's panel, in pixels
MARKS = ((0, 190, 255), (255, 120, 60), (130, 220, 60), (240, 90, 220), (255, 214, 10), (120, 130, 255))

Record = DenseRecord | PointRecord


class Place(NamedTuple):
    """A point of the image, and the token there."""

    point: tuple[float, float]  # (x, y) in [0, 1] of the image
    token: int  # in its level, row by row


def self_attention(
    loaded: LoadedDetector, frame: Frame, places: list[Place], layer: int, level: int
) -> tuple[Record, int]:
    """(what the tokens at `places`, of one level, attend to in one layer, the number of layers).

    The record has these tokens alone, in the order of `places`, and keys of their level alone where each level attends
    to itself. Raises UserError for a detector without such an attention, and for a layer that is not there.
    """
    lengths = [height * width for height, width in frame.level_sizes]

    def forward(arrays, image, tokens):
        detector = loaded.skeleton.merge(arrays)
        with record_attention(detector, "encoder.layers") as records:
            detector(*normalize_images(image, jnp.asarray([image.shape[1:3]], jnp.int32)))
        by_layer: dict[int, list[Record]] = {}
        for record in records:
            if found := SELF_ATTENTION.match(record.name):
                by_layer.setdefault(int(found[1]), []).append(record)
        check_layer(len(by_layer), layer, loaded.config.model.name)
        chosen = by_layer[range(len(by_layer))[layer]]
        if len(chosen) == 1:  # all levels together
            return _rows(chosen[0], tokens + sum(lengths[:level])), jnp.zeros(len(by_layer))
        return _rows(chosen[level], tokens), jnp.zeros(len(by_layer))

    tokens = jnp.asarray([place.token for place in places])
    record, layers = jax.device_get(jax.jit(forward)(loaded.arrays, frame.image[None], tokens))
    return record, len(layers)


def check_layer(layers: int, layer: int, name: str) -> None:
    if not layers:
        raise UserError(
            f"The encoder of this {name} has no self-attention among the places of an image, so there is nothing to "
            "draw; visualize attention draws where its queries look."
        )
    if not -layers <= layer < layers:
        raise UserError(f"--layer: the encoder has the layers 0 to {layers - 1}, and -1 is the last; not {layer}.")


def _rows(record: Record, tokens) -> Record:
    """Of a record, the queries `tokens` alone."""
    if isinstance(record, PointRecord):
        parts = {name: getattr(record, name)[:, tokens] for name in ("location", "weight", "reference")}
        return record.replace(**parts)
    weight = record.segment_weight[:, tokens]
    return record.replace(probability=record.probability[:, :, tokens], bias=None, segment_weight=weight)


def place_at(point: tuple[float, float], frame: Frame, level: int) -> Place:
    """The token whose cell holds a point, (x, y) in [0, 1] of the image."""
    (height, width), stride = frame.image.shape[:2], frame.strides[level]
    rows, columns = frame.level_sizes[level]
    row, column = min(int(point[1] * height / stride), rows - 1), min(int(point[0] * width / stride), columns - 1)
    return Place(point, row * columns + column)


def make_view(record: Record, places: list[Place], image: UInt8[np.ndarray, "h w 3"], frame: Frame, level: int) -> View:
    """The image with all points, and a panel for each."""
    own_level = isinstance(record, DenseRecord) and record.probability.shape[-1] < sum(
        height * width for height, width in frame.level_sizes
    )
    if own_level:
        frame = Frame(frame.image, (frame.strides[level],))

    def panel(number):
        def draw(size):
            if isinstance(record, PointRecord):
                reference = record.reference[0, number].mean(axis=0)
                location, weight = record.location[0, number], record.weight[0, number]
                return draw_points(frame.image, location, weight, reference, size)
            heat = spread(record.probability[0, :, number].mean(axis=0), frame, size)
            return mark(draw_heat(frame.image, heat), [places[number].point], [number])

        return Panel(f"point {number}", draw)

    def overview(size):
        picture = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
        return mark(picture, [place.point for place in places], range(len(places)))

    columns = min(COLUMNS, -(-len(places) // 2))  # two lines are as high as the image beside them
    return View([Panel("points", overview)], fold([panel(number) for number in range(len(places))], columns))


def mark(picture: UInt8[np.ndarray, "h w 3"], points, numbers) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with a numbered dot at each point, (x, y) in [0, 1]."""
    canvas = Image.fromarray(picture)
    draw, (height, width) = ImageDraw.Draw(canvas), picture.shape[:2]
    radius = max(7, max(height, width) // 40)
    for (x, y), number in zip(points, numbers, strict=True):
        x, y, color = x * width, y * height, MARKS[number % len(MARKS)]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=(0, 0, 0))
        font = font_for("0", radius * 1.6)
        draw.text((x, y), str(number), fill=(0, 0, 0), font=font, anchor="mm")
    return np.asarray(canvas)


def parse_points(texts: list[str], size: tuple[int, int]) -> list[tuple[float, float]]:
    """ "120,80" of an image of (height, width) -> (x, y) in [0, 1]. Raises UserError."""
    points = []
    for text in texts:
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"--points: {text} is not x,y in pixels, as in 120,80.") from None
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(f"--points: {text} is outside of the image, which has {size[1]} x {size[0]} pixels.")
        points.append((x / size[1], y / size[0]))
    return points


def best_points(loaded: LoadedDetector, frame: UInt8[np.ndarray, "H W 3"]) -> list[tuple[float, float]]:
    """The centres of the best detections of different objects, inside of the image."""
    predictions = predict(loaded, frame)
    scores = np.asarray(build_classification(loaded.config.loss).scores(predictions.logits[-1]))[0]
    boxes: Float[np.ndarray, "Q 4"] = predictions.boxes[-1, 0]
    chosen = choose_queries(scores, boxes, loaded.classes, None, POINTS)
    centers = np.clip(boxes[[query for query, _, _ in chosen], :2], 0, 1 - 1e-6)
    return [(float(x), float(y)) for x, y in centers]


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    check_image_flags(values)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config = loaded.config
    image, name = read_image(values, config)
    points = parse_points(values.points, image.shape[:2])
    strides = loaded.skeleton.merge(loaded.arrays).token_strides
    if not 0 <= values.level < len(strides):
        raise UserError(f"--level: the detector has the levels 0 to {len(strides) - 1}, not {values.level}.")
    keep_compiled(config.train.compilation_cache)
    frame = Frame(see(image, config.data), strides)
    points = points or best_points(loaded, frame.image)
    places = [place_at(point, frame, values.level) for point in points]
    record, layers = self_attention(loaded, frame, places, values.layer, values.level)
    view = make_view(record, places, image, frame, values.level)
    title = f"Encoder self-attention of {config.model.name} in {Path(name).name}"
    text = note(record, range(layers)[values.layer], layers, strides[values.level])
    aspect = frame.image.shape[1] / frame.image.shape[0]
    save_sheet(values.output, [view], aspect, title=title, note=text, side=SIDE)
    print(f"Wrote {values.output}: {len(places)} points in layer {range(layers)[values.layer]} of {stored.items}.")


def note(record: Record, layer: int, layers: int, stride: int) -> str:
    """How to read the sheet."""
    text = f"Layer {layer} (of 0 to {layers - 1}), tokens of stride {stride}."
    if isinstance(record, PointRecord):
        return f"{text} Dots are what the token, the cross, reads with all heads: the lighter the more it counts."
    return f"{text} The mean of all heads; each map has a scale of its own: light yellow is where it is highest."

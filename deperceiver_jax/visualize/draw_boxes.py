"""Boxes with class names and scores, drawn into a picture."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from deperceiver_jax.visualize.fonts import font_for

READABLE_SIDE = 512  # an image with a shorter long side is enlarged to it before anything is drawn
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many there are


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
    font_size = max(12, round(target / 56))

    order = range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    limit = np.array([size[0] - 1, size[1] - 1] * 2)
    placed: list[tuple] = []  # (label's rectangle, its text and font, box, colour), best first
    for k in order:
        box = np.clip(np.asarray(boxes[k]) * scale, 0, limit).round().astype(int).tolist()
        name = name_of(int(labels[k]))
        text = name if scores is None else f"{name} {scores[k]:.2f}"
        font = font_for(text, font_size)
        text, extent = _fit(text, font, size[0])
        rectangle = _place(box, extent, size, line, [p[0] for p in placed])
        placed.append((rectangle, (text, font), box, class_color(int(labels[k]))))
    for _, _, (left, top, right, bottom), color in reversed(placed):
        white = (left - 1, top - 1, right + 1, bottom + 1)  # around it, so it is seen on any ground
        draw.rectangle(white, outline=(255, 255, 255))
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
    for rectangle, (text, font), _, color in reversed(placed):
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
    best, least = (), math.inf
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

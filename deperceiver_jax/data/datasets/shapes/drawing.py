"""Draws the pictures of the built-in data set: textured shapes of three sizes on a cluttered, noisy background.

Everything that makes the pictures easy or hard is a constant below. A picture depends only on these constants and on
(recipe, split, index), so whoever changes a constant raises the versions of the recipes that it changes.
"""

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

CLASSES = ("disk", "square", "triangle", "star")  # category ids 1, 2, 3, 4
IMAGES = {"train": 4000, "validation": 200}

# COCO calls an object small below 32^2 and large above 96^2 pixels, in images of typically 640 x 480 pixels. The same
# shares of our images tell small, medium and large apart here.
SMALL_SHARE = 32**2 / (640 * 480)
LARGE_SHARE = 96**2 / (640 * 480)
AREA_SCALE = 128 * 120 / (640 * 480)  # the same bounds in pixels of the mean image of `standard`: 7^2, 21^2
MIN_SHARE = 0.0015  # of a small shape: about 5 pixels across
MAX_SHARE = 0.15  # of a large shape
MIN_VISIBLE = 0.6  # share of every shape that the shapes drawn over it leave to be seen
PLACEMENT_TRIES = 20  # a shape that finds no place after so many is left out

CLASS_HUES = (0.0, 0.6, 0.33, 0.14)  # red disks, blue squares, green triangles, yellow stars
HUE_JITTER = 0.04
HUE_KEPT = 1.0  # probability that a shape wears the hue of its class rather than any
SATURATION = (0.65, 1.0)
BRIGHTNESS = (0.65, 1.0)
TEXTURE_CONTRAST = (0.1, 0.45)  # amplitude of the stripes, checks or dots, as a share of the brightness
TEXTURE_PERIOD = (3.0, 8.0)  # pixels
RIM = 0.8  # inside this share of a shape's radius its colour is full; outside it is darker
RIM_BRIGHTNESS = 0.6

BACKGROUND_SATURATION = 0.25  # at most
BACKGROUND_BRIGHTNESS = (0.25, 0.75)
CLUTTER = (4, 12)  # strokes and blots without a class
NOISE = 6.0  # standard deviation of the pixel noise, in levels of 255

JPEG_QUALITY = 92

_SUPERSAMPLE = 4
_STREAMS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class Recipe:
    """How large a picture is, how many shapes it has, and how likely each is small, medium or large."""

    description: str
    version: str
    heights: tuple[int, int]  # pixels, both ends included
    widths: tuple[int, int]
    objects: tuple[int, int]  # both ends included
    size_odds: tuple[float, float, float]
    magnification: float = 1.0  # of shapes: their shares are of a picture with so many times the area


RECIPES = {
    "standard": Recipe(
        "One to six shapes of all three sizes.",
        version="1.0.0",
        heights=(112, 144),
        widths=(96, 144),
        objects=(1, 6),
        size_odds=(0.25, 0.4, 0.35),
    ),
    # A quarter of the pixels with shapes of as many pixels as there: crowded, and cheap to train on.
    "small": Recipe(
        "Four to eight shapes, most of them small, in small images.",
        version="2.0.0",
        heights=(56, 64),
        widths=(56, 64),
        objects=(4, 8),
        size_odds=(0.8, 0.2, 0.0),
        magnification=4.0,
    ),
}


class Picture(NamedTuple):
    """A drawn image and what is in it; the boxes enclose what can be seen of each shape."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # float64 [M, 4], xywh in pixels
    labels: np.ndarray  # int64 [M], position in CLASSES
    areas: np.ndarray  # float64 [M], visible pixels


def draw(recipe: Recipe, split: str, index: int, only: int | None = None) -> Picture:
    """Picture `index` of a split; `only`: with shapes of this class (its position in CLASSES) alone."""
    stream = [int(part) for part in recipe.version.split(".")] + [_STREAMS[split], index]
    rng = np.random.default_rng(stream)
    height, width = int(rng.integers(*recipe.heights, endpoint=True)), int(rng.integers(*recipe.widths, endpoint=True))
    canvas = _background(rng, height, width)
    labels = []
    masks: list[np.ndarray] = []
    for radius in _radii(rng, recipe, recipe.magnification * height * width):
        label = int(rng.integers(len(CLASSES)))
        label = label if only is None else only
        outline = _outline(rng, label) * radius
        placed = _place(rng, outline, masks, height, width)
        if placed is None:
            continue
        center, window, alpha, masks = placed
        color = _texture(rng, label, *alpha.shape)
        rim = _fill(outline * RIM + center, window)[..., None]
        color = color * (RIM_BRIGHTNESS + (1 - RIM_BRIGHTNESS) * rim)
        canvas[window] += (color - canvas[window]) * alpha[..., None]
        labels.append(label)
    noisy = canvas * 255.0 + NOISE * rng.standard_normal(canvas.shape, np.float32)
    image = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    boxes = np.array([_box(mask) for mask in masks], np.float64).reshape(-1, 4)
    areas = np.array([mask.sum() for mask in masks], np.float64)
    return Picture(image, boxes, np.array(labels, np.int64), areas)


def encode(image: np.ndarray) -> bytes:
    """A picture as the data set stores it, a JPEG."""
    return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorsubsampling="444")


def _radii(rng, recipe, image_area):
    """Radii of shapes from large to small, so that a small one never vanishes under a large one."""
    bounds = np.array([MIN_SHARE, SMALL_SHARE, LARGE_SHARE, MAX_SHARE]) * image_area
    count = int(rng.integers(*recipe.objects, endpoint=True))
    group = rng.choice(3, size=count, p=recipe.size_odds)
    areas = np.exp(rng.uniform(np.log(bounds[group]), np.log(bounds[group + 1])))
    return np.sqrt(np.sort(areas)[::-1] / np.pi)


def _outline(rng, label):
    """Corners float [P, 2] around the origin, scaled to the area of the unit disk, turned by some angle."""
    kind = CLASSES[label]
    corners = {"disk": 48, "square": 4, "triangle": 3, "star": 10}[kind]
    turn = {"disk": 0.0, "square": np.pi / 12, "triangle": np.pi / 6, "star": np.pi / 5}[kind]
    angle = -np.pi / 2 + (np.pi / 4 if kind == "square" else 0.0) + rng.uniform(-turn, turn)
    angles = angle + 2 * np.pi * np.arange(corners) / corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    if kind == "star":
        points[1::2] *= 0.42
    x, y = points.T
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    return points * np.sqrt(np.pi / area)


def _place(rng, outline, masks, height, width):
    """A centre where the shape fits in and hides no other too much.

    Returns (centre, window of the canvas, coverage in it, visible masks of all shapes with its own last), or None.
    """
    low, high = -outline.min(axis=0), np.array([width, height]) - outline.max(axis=0)
    if np.any(low >= high):
        return None
    for _ in range(PLACEMENT_TRIES):
        center = rng.uniform(low, high)
        (left, top), (right, bottom) = np.floor(center - low).astype(int), np.ceil(center + outline.max(0)).astype(int)
        window = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
        alpha = _fill(outline + center, window)
        solid = np.zeros((height, width), bool)
        solid[window] = alpha > 0.5
        visible = [mask & ~solid for mask in masks]
        kept = all(after.sum() >= MIN_VISIBLE * before.sum() for after, before in zip(visible, masks, strict=True))
        if kept and solid.any():
            return center, window, alpha, [*visible, solid]
    return None


def _fill(points, window):
    """How much of each pixel of a window a polygon covers, in [0, 1]. Points are (x, y) in pixels of the canvas."""
    rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    patch = np.zeros((height * _SUPERSAMPLE, width * _SUPERSAMPLE), np.uint8)
    corners = np.rint((points - (columns.start, rows.start)) * _SUPERSAMPLE - 0.5).astype(np.int32)
    cv2.fillPoly(patch, [corners], 255)
    return patch.reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE).mean(axis=(1, 3)) / 255.0


def _texture(rng, label, height, width):
    """The shape's colour with stripes, checks or dots in it: float [height, width, 3] in [0, 1]."""
    kept = rng.random() < HUE_KEPT
    hue = CLASS_HUES[label] + rng.uniform(-HUE_JITTER, HUE_JITTER) if kept else rng.random()
    color = np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*SATURATION), rng.uniform(*BRIGHTNESS)))
    angle, period = rng.uniform(0, np.pi), rng.uniform(*TEXTURE_PERIOD)
    contrast, kind = rng.uniform(*TEXTURE_CONTRAST), rng.integers(3)
    y, x = np.mgrid[:height, :width] * (2 * np.pi / period)
    along = np.sin(x * np.cos(angle) + y * np.sin(angle))
    across = np.sin(y * np.cos(angle) - x * np.sin(angle))
    pattern = (along, np.sign(along * across), np.maximum(along * across, 0) * 2 - 1)[kind]
    return np.clip(color * (1 + contrast * pattern[..., None]), 0, 1)


def _muted(rng):
    shade = colorsys.hsv_to_rgb(
        rng.random(), rng.uniform(0, BACKGROUND_SATURATION), rng.uniform(*BACKGROUND_BRIGHTNESS)
    )
    return np.array(shade)


def _background(rng, height, width):
    """Soft clouds of muted colour with strokes and blots on them: float64 [height, width, 3] in [0, 1]."""
    clouds = np.array([_muted(rng) for _ in range(12)], np.float32).reshape(3, 4, 3)
    canvas = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.uniform(-0.08, 0.08, (height // 6 + 1, width // 6 + 1)).astype(np.float32)
    canvas += cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    for _ in range(int(rng.integers(*CLUTTER, endpoint=True))):
        color = tuple(float(level) for level in _muted(rng))
        start = rng.integers(0, [width, height])
        if rng.random() < 0.6:
            end = start + rng.integers(-60, 61, 2)
            cv2.line(canvas, start.tolist(), end.tolist(), color, int(rng.integers(1, 4)))
        else:
            axes = rng.integers(2, 12, 2).tolist()
            cv2.ellipse(canvas, start.tolist(), axes, float(rng.uniform(0, 180)), 0, 360, color, -1)
    return np.clip(cv2.GaussianBlur(canvas, (3, 3), 0), 0, 1).astype(np.float64)


def _box(mask):
    """xywh around the True pixels."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = columns[0], rows[0]
    return left, top, columns[-1] + 1 - left, rows[-1] + 1 - top

"""Records of attention -> maps and points in the frame of the image, for one query.

A picture shows what the detector saw, without padding. A map is a weight for each pixel of a picture: the
attention of a cell is spread evenly over the pixels that the cell covers, and levels are added, so a cell of stride 32
is as bright as the 16 cells of stride 8 in its place that together have as much attention.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from deperceiver_jax.models.layers.recorder import DenseRecord, PointRecord

COLUMNS = 4  # small panels beside one another

Size = tuple[int, int]  # (height, width)
Draw = Callable[[Size], UInt8[np.ndarray, "h w 3"]]


class Panel(NamedTuple):
    """One picture of the sheet: a few words, and a function that draws it at any size."""

    caption: str
    draw: Draw


class View(NamedTuple):
    """Where one query looks: all heads together in large panels, and lines of small ones."""

    large: list[Panel]
    lines: list[list[Panel]]


class Frame(NamedTuple):
    """What maps are drawn onto, and how the tokens cover it."""

    image: UInt8[np.ndarray, "H W 3"]  # what the detector saw, without padding
    strides: tuple[int, ...]  # of the levels that the tokens are made of, in their order; for points where it is padded
    padded: Size | None = None  # of what it was the top left of, if there was more

    @property
    def level_sizes(self) -> list[Size]:
        return self._in_cells(self.padded or self.image.shape[:2])

    @property
    def beyond(self) -> Float[np.ndarray, "L 2"]:
        """(x, y) of each level, or of all: how many times as large as what of it holds image a padded map is."""
        if self.padded is None:
            return np.ones((1, 2))
        return np.array(self.level_sizes)[:, ::-1] / np.array(self._in_cells(self.image.shape[:2]))[:, ::-1]

    def _in_cells(self, size: Size) -> list[Size]:
        return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in self.strides]


def spread(
    weight: Float[np.ndarray, " K"], frame: Frame, size: Size, *, by_area: bool = True
) -> Float[np.ndarray, "h w"]:
    """A weight for each token -> one for each pixel of a picture of `size`, bicubic between the centres of cells.

    A cell of stride s covers s x s pixels of the frame; what the last ones cover beyond it is cut off. `by_area` makes
    weights densities; without it, the value of a cell counts whatever its size.
    """
    lengths = [height * width for height, width in frame.level_sizes]
    if sum(lengths) != len(weight):
        raise ValueError(f"Maps of {frame.level_sizes} have {sum(lengths)} cells, not {len(weight)}.")
    height, width = frame.image.shape[:2]
    total = np.zeros(size)
    for level, cells in enumerate(np.split(np.asarray(weight, np.float32), np.cumsum(lengths)[:-1])):
        stride = frame.strides[level]
        cells = Image.fromarray(cells.reshape(frame.level_sizes[level]))
        box = (0, 0, width / stride, height / stride)
        pixels = np.maximum(np.asarray(cells.resize(size[::-1], Image.Resampling.BICUBIC, box)), 0)
        total += pixels / (stride**2 if by_area else 1)
    return total


def dense_view(record: DenseRecord, query: int, frame: Frame) -> View:
    """Attention of queries to the image itself, under the Gaussian that modulates it where there is one."""
    probability = record.probability[0, :, query]
    large = [Panel("attention, mean of all heads", _heat(probability.mean(axis=0), frame))]
    heads = [Panel(f"head {i}", _heat(row, frame)) for i, row in enumerate(probability)]
    gaussians = _gaussians(record, query)
    if gaussians is None:
        return View(large, fold(heads))
    if len(gaussians) == 1:
        large.insert(0, Panel("Gaussian of all heads", _heat(gaussians[0], frame, by_area=False)))
        return View(large, fold(heads))
    maps = [Panel(f"head {i}, Gaussian", _heat(row, frame, by_area=False)) for i, row in enumerate(gaussians)]
    lines = [line for pair in zip(fold(maps), fold(heads), strict=True) for line in pair]
    return View(large, lines)


def latent_view(decoder: DenseRecord, encoder: DenseRecord, query: int, frame: Frame) -> View:
    """Attention of queries to latents, seen through what the latents read from the image, the mean of their heads.

    What latents tell one another in between is not in it. The keys of queries are the latents,
    and the image's tokens after them if queries look at these too.
    """
    probability = decoder.probability[0, :, query]
    reading = encoder.probability[0].mean(axis=0)
    num_latents, direct = len(reading), probability.shape[1] - len(reading)
    through = np.concatenate([reading, np.eye(reading.shape[1], dtype=reading.dtype)[:direct]])
    large = [Panel("attention through latents, all heads", _heat(probability.mean(axis=0) @ through, frame))]
    lines = []
    if len(probability) > 1:
        lines = fold([Panel(f"head {i}", _heat(row @ through, frame)) for i, row in enumerate(probability)])
    share = probability.mean(axis=0)[:num_latents]
    strongest = np.argsort(-share, kind="stable")[: COLUMNS if lines else 2 * COLUMNS]
    latents = [Panel(f"latent {i}, {share[i]:.0%}", _heat(reading[i], frame)) for i in strongest]
    own = [
        Panel(f"latent {i}, Gaussian", _heat(rows.mean(axis=0), frame, by_area=False))
        for i in strongest
        if (rows := _gaussians(encoder, int(i))) is not None
    ]
    if not own:
        return View(large, lines + fold(latents))
    return View(large, lines + [line for pair in zip(fold(latents), fold(own), strict=True) for line in pair])


def point_view(record: PointRecord, query: int, frame: Frame) -> View:
    """The points that a query reads, all heads together and each by itself."""
    location = record.location[0, query] * frame.beyond[:, None]  # [H L K 2]
    weight = record.weight[0, query]  # [H L K]
    reference = (record.reference[0, query] * frame.beyond).mean(axis=0)  # without padding, all levels have the same

    def panel(caption, heads):
        return Panel(caption, lambda size: draw_points(frame.image, location[heads], weight[heads], reference, size))

    heads = [panel(f"head {i}", slice(i, i + 1)) for i in range(len(location))]
    return View([panel("points of all heads", slice(None))], fold(heads))


def _gaussians(record: DenseRecord, query: int) -> Float[np.ndarray, "Hb K"] | None:
    """exp(bias), times how much the query counts each level; that is the map itself, not its logarithm."""
    if record.bias is None:
        return None
    bias = record.bias[0, :, query if record.bias.shape[2] > 1 else 0]
    return np.exp(bias) * np.repeat(record.segment_weight[0, query], record.segments)


def fold(panels: Sequence[Panel], columns: int = COLUMNS) -> list[list[Panel]]:
    """Lines of so many panels."""
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]


def _heat(weight: Float[np.ndarray, " K"], frame: Frame, *, by_area: bool = True) -> Draw:
    return lambda size: draw_heat(frame.image, spread(weight, frame, size, by_area=by_area))


def _colors(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n 3"]:
    """0 to 1 -> from dark violet over red and orange to light yellow, ever lighter."""
    stops = np.array([(20, 11, 52), (87, 21, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
    return np.stack([np.interp(x, np.linspace(0, 1, len(stops)), channel) for channel in stops.T], axis=-1)


def _faded(image: UInt8[np.ndarray, "H W 3"], size: Size) -> Float[np.ndarray, "h w 3"]:
    """The image in grey, darkened, so that colours on it mean attention alone."""
    grey = Image.fromarray(image).convert("L").resize(size[::-1], Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(grey, np.float64)[..., None], 3, axis=-1) * 0.7


def draw_heat(image: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A map over the image; its highest value is light yellow, whatever that is, and 0 is the image in grey."""
    heat = heat / max(heat.max(), np.finfo(np.float32).tiny)
    opacity = 0.9 * np.sqrt(heat)[..., None]
    return np.clip(_faded(image, heat.shape) * (1 - opacity) + _colors(heat) * opacity, 0, 255).round().astype(np.uint8)


def draw_points(
    image: UInt8[np.ndarray, "H W 3"],
    location: Float[np.ndarray, "H L K 2"],
    weight: Float[np.ndarray, "H L K"],
    reference: Float[np.ndarray, "2"],
    size: Size,
) -> UInt8[np.ndarray, "h w 3"]:
    """Dots where a query looks, the heaviest light yellow, and a cross at its reference; larger dots: coarser levels.

    What lies outside of the image is left out.
    """
    enlarged = 3  # drawn larger and shrunk, for smooth edges
    height, width = (side * enlarged for side in size)
    canvas = Image.fromarray(_faded(image, (height, width)).round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    unit = enlarged * (max(size) / 320) ** 0.5  # dots of small panels are small, but not half as large
    places, weight = location.reshape(-1, 2) * (width, height), weight.reshape(-1)
    level = np.broadcast_to(np.arange(location.shape[1])[None, :, None], location.shape[:3]).reshape(-1)
    colors = _colors(weight / weight.max()).round().astype(int)
    for k in np.argsort(weight, kind="stable"):
        (x, y), radius = places[k], unit * (3 + 0.8 * level[k])
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), tuple(colors[k]), (225, 225, 225), round(unit * 0.5)
        )
    x, y = reference * (width, height)
    for arm, color, line in ((9, (0, 0, 0), 4), (8, (80, 220, 255), 2)):
        arm, line = arm * unit, max(1, round(line * unit))
        draw.line((x - arm, y, x + arm, y), color, line)
        draw.line((x, y - arm, x, y + arm), color, line)
    return np.asarray(canvas.resize(size[::-1], Image.Resampling.LANCZOS))

"""Copy-paste of small objects, as numbers: which objects come into which training picture, where, and their boxes.

Small objects have few pixels and few pictures; more copies of them, elsewhere, are more to learn from (Kisantal et al.,
arXiv:1902.07296). Without outlines of objects, what is pasted is the rectangle of a box, with a margin that fades into
the picture. It comes from the picture's group, its neighbours in the batch, which are decoded anyhow. Sizes of outputs
stay, and with them plan and buckets. All numbers depend on (seed, epoch, example), on sizes and boxes, never on pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32
from ml_collections import ConfigDict

from deperceiver_jax.data.batches.geometry import PASTED, uniform
from deperceiver_jax.errors import check_at_least, check_between

GROUP = 4  # rows of a batch whose pictures give objects to one another
MARGIN = 0.25  # of an object's longer side: how much of its surroundings comes along and fades
PLACES = 8  # where an object may come to lie; the first free place is taken
MOST_PASTED = 256


class Member(NamedTuple):
    """A picture of a group as geometry.py makes it."""

    size: tuple[int, int]  # (height, width) in pixels
    window: tuple[float, float, float, float]  # of the stored picture after its flip, see Geometry.window
    boxes: Float32[np.ndarray, "K 4"]  # cxcywh in [0, 1]
    labels: Int32[np.ndarray, " K"]


class Piece(NamedTuple):
    """A window of a picture and where it lies, each (top, left, bottom, right) in pixels."""

    member: int  # of the group
    window: tuple[float, float, float, float]  # of the member's stored picture after its flip
    place: tuple[int, int, int, int]  # in the output
    fade: int  # pixels at its border over which it fades into what lies below


class Pasted(NamedTuple):
    """What comes into a picture, a piece an object; no two of its objects overlap, nor any with the picture's own."""

    pieces: list[Piece]
    boxes: Float32[np.ndarray, "K 4"]  # cxcywh in [0, 1] of the output
    labels: Int32[np.ndarray, " K"]


def draw_pasted(
    members: Sequence[Member], own: int, room: int, config: ConfigDict, key: tuple[int, int, int]
) -> Pasted:
    """Draws up to config.paste_objects objects, and no more than `room`, for the picture `own` of a group.

    An object can be drawn twice. One that finds no free place is left out. key: (seed, epoch, example); `config` is
    config.data.
    """
    seed, epoch, example = key
    (count, *_), *draws = uniform(seed, epoch, (PASTED, example), (config.paste_objects + 1, 1 + 2 * PLACES)).tolist()
    objects = _small_objects(members, config.paste_max_side)
    size = members[own].size
    taken = _to_pixels(members[own].boxes, size)
    pieces, boxes, labels = [], np.zeros((0, 4)), []
    for choice, *corners in draws[: min(int(count * (config.paste_objects + 1)), room)] if objects else ():
        member, box, label, window, fade = objects[int(choice * len(objects))]
        extent = np.subtract(window[2:], window[:2])
        if (extent > size).any():
            continue
        corners = np.floor(np.reshape(corners, (PLACES, 2)) * (size - extent + 1))
        places = np.concatenate([corners, corners + extent], axis=1).astype(int)
        free = np.flatnonzero(~_overlap(places[:, [1, 0, 3, 2]], taken).any(axis=1))
        if len(free) == 0:
            continue
        place = tuple(places[free[0]].tolist())
        moved = box + np.tile(np.subtract(place[:2], window[:2])[::-1], 2)
        taken, boxes = np.concatenate([taken, [moved]]), np.concatenate([boxes, [moved]])
        pieces.append(Piece(member, _stored(members[member], window), place, fade))
        labels.append(label)
    return Pasted(pieces, _to_shares(boxes, size), np.array(labels, np.int32))


def check_pasting(config: ConfigDict) -> None:
    """Raises UserError for fields of config.data by which nothing could be pasted."""
    check_between("config.data.paste_objects", config.paste_objects, 0, MOST_PASTED)
    check_at_least("config.data.paste_max_side", config.paste_max_side, 1)


def _small_objects(members, max_side):
    """(member, xyxy box, label, window, fade) of what may be pasted: small, whole, with nothing else in its margin."""
    found = []
    for member, (size, _, shares, labels) in enumerate(members):
        boxes = _to_pixels(shares, size)
        side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
        fade = np.maximum(np.rint(MARGIN * side), 1)[:, None]
        low, high = np.floor(boxes[:, :2]) - fade, np.ceil(boxes[:, 2:]) + fade
        crowded = _overlap(np.concatenate([low, high], axis=1), boxes).sum(axis=1) > 1  # one is the object itself
        inside = (low >= 0).all(axis=1) & (high <= size[::-1]).all(axis=1)
        for k in np.flatnonzero((side <= max_side) & inside & ~crowded).tolist():
            (left, top), (right, bottom) = low[k].astype(int).tolist(), high[k].astype(int).tolist()
            found.append((member, boxes[k], labels[k], (top, left, bottom, right), int(fade[k, 0])))
    return found


def _stored(member, window):
    """A window of a member's output -> the same of its stored picture after the flip."""
    start, end = np.reshape(member.window, (2, 2))
    stored = start + np.reshape(window, (2, 2)) * ((end - start) / member.size)
    return tuple(stored.reshape(4).tolist())


def _overlap(one: Float64[np.ndarray, "N 4"], other: Float64[np.ndarray, "M 4"]) -> Bool[np.ndarray, "N M"]:
    """Whether xyxy boxes share any area."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    return (low < np.minimum(one[:, None, 2:], other[None, :, 2:])).all(axis=-1)


def _to_pixels(boxes: Float32[np.ndarray, "K 4"], size) -> Float64[np.ndarray, "K 4"]:
    """cxcywh in [0, 1] -> xyxy in pixels."""
    center, half = boxes[:, :2].astype(np.float64), boxes[:, 2:] / 2.0
    return np.concatenate([center - half, center + half], axis=1) * np.tile(size[::-1], 2)


def _to_shares(boxes: Float64[np.ndarray, "K 4"], size) -> Float32[np.ndarray, "K 4"]:
    """xyxy in pixels -> cxcywh in [0, 1]."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return (np.concatenate([(low + high) / 2, high - low], axis=1) / np.tile(size[::-1], 2)).astype(np.float32)

"""The report's pictures: which ones, what is in them and what was found, and their pixels within a number of bytes."""

import base64
from collections.abc import Iterable

import cv2
import numpy as np
import simplejpeg

from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.report.analysis import Analysis, box_scores, boxes_by_class

PICTURES = 12  # of each kind: worst, best, random
MOST_CLASSES = 60  # that have a picture of their own: those with the most boxes
MOST_DETECTIONS = 60  # of a picture, those with the best scores
SIDES = (512, 416, 352, 288, 224, 160, 112)  # longest sides in pixels; the first with which all fit is taken
QUALITY = 72  # of JPEG


def choose(analysis: Analysis, image_of_box: np.ndarray, image_of_detection: np.ndarray, images: int) -> dict:
    """Position of an image -> the kinds it is shown as: worst, best, random, and class for the worst of a class.

    image_of_box, image_of_detection: positions, of each annotation and each counted detection. Worst and best are by
    F1 of the image at the report's threshold and IoU 0.5, then by the number of mistakes or of boxes.
    """
    counted, found = analysis.counted, analysis.matches
    taken = found.counts & (counted.score >= analysis.threshold)
    missed = ~counted.crowd & (box_scores(analysis) < analysis.threshold)

    def per_image(images_of, chosen):
        return np.bincount(images_of[chosen], minlength=images)

    right = per_image(image_of_detection, taken & found.right)
    wrong = per_image(image_of_detection, taken & ~found.right) + per_image(image_of_box, missed)
    something = np.nonzero(right + wrong)[0]
    f1 = 2 * right / np.maximum(2 * right + wrong, 1)
    number = min(PICTURES, -(-images // 3))
    worst = something[np.lexsort((-wrong[something], f1[something]))][:number]
    best = something[np.lexsort((-right[something], -f1[something]))][:number]
    kinds: dict[int, list[str]] = {}
    for kind, chosen in (
        ("worst", worst),
        ("best", best),
        ("random", np.sort(np.random.default_rng(0).permutation(images)[:number])),
        ("class", _worst_of_classes(analysis, image_of_box, image_of_detection, missed, taken & ~found.right)),
    ):
        for i in chosen:
            kinds.setdefault(int(i), []).append(kind)
    return kinds


def _worst_of_classes(analysis, image_of_box, image_of_detection, missed, wrong) -> Iterable[int]:
    """Of each class with boxes, the image with most mistakes of that class among those that have a box of it."""
    counted = analysis.counted
    boxes = boxes_by_class(counted)
    largest = sorted((k for k in range(len(boxes)) if boxes[k]), key=lambda k: -boxes[k])[:MOST_CLASSES]
    chosen = []
    for k in sorted(largest):
        candidates = np.unique(image_of_box[(counted.box_class == k) & ~counted.crowd])
        mistakes = np.concatenate(
            [image_of_box[missed & (counted.box_class == k)], image_of_detection[wrong & (counted.found_class == k)]]
        )
        chosen.append(int(candidates[np.bincount(mistakes, minlength=candidates.max() + 1)[candidates].argmax()]))
    return dict.fromkeys(chosen)


def describe(analysis: Analysis, source, truth: dict, results: list[dict], kinds: dict, of_box, of_detection) -> list:
    """An entry a picture, without its pixels: `name`, `kinds`, `width`, `height`, and

    `truth` [left, top, width, height, class, score of the detection that found it (-1: none; -2: a crowd)],
    `found` [left, top, width, height, class, score, 1 right, 0 wrong, -1 counts nowhere]; in pixels of the image.
    """
    counted, found = analysis.counted, analysis.matches
    score = box_scores(analysis)
    entries = []
    for i, shown_as in kinds.items():
        height, width = np.asarray(source.sizes[i]).tolist()
        true, boxes = [], []
        for a in np.nonzero(of_box == i)[0].tolist():
            state = -2 if counted.crowd[a] else _short(score[a])
            true.append([*_pixels(truth["annotations"][a]["bbox"]), int(counted.box_class[a]), state])
        mine = np.nonzero(of_detection == i)[0]
        mine = mine[np.argsort(-counted.score[mine], kind="stable")][:MOST_DETECTIONS]
        for d in mine.tolist():
            state = int(found.right[d]) if found.counts[d] else -1
            row = [*_pixels(results[d]["bbox"]), int(counted.found_class[d]), _short(counted.score[d]), state]
            boxes.append(row)
        entry = {"name": source.filename(i), "kinds": shown_as, "width": width, "height": height}
        entries.append(entry | {"truth": true, "found": boxes})
    return entries


def pixels(source, positions: Iterable[int], most_bytes: int) -> list[str]:
    """JPEGs as data: addresses, in as great a size as leaves them together within `most_bytes` characters.

    Where the smallest do not fit, the last ones are empty.
    """
    images = [_shrink(decode_image(source.image_bytes(i), source.orientation(i)), SIDES[0]) for i in positions]
    texts: list[str] = []
    for side in SIDES:
        texts = [_data_address(image, side) for image in images]
        if sum(map(len, texts)) <= most_bytes:
            return texts
    room = np.cumsum([len(text) for text in texts]) <= most_bytes
    return [text if fits else "" for text, fits in zip(texts, room, strict=True)]


def _shrink(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _data_address(image: np.ndarray, longest: int) -> str:
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(_shrink(image, longest)), quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _pixels(box: list[float]) -> list[float]:
    return [round(side, 1) for side in box]


def _short(score: float) -> float:
    return round(float(score), 4)

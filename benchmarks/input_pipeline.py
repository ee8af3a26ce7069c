"""How fast images are loaded, and how much of what is loaded is image: our loader beside the plain Pillow pipeline.

    taskset -c 0 python benchmarks/input_pipeline.py --coco=/data/coco
    python benchmarks/input_pipeline.py                     # without COCO: generated photographs of COCO's sizes
    python benchmarks/input_pipeline.py --annotations=/data/coco/annotations/instances_train2017.json
    python benchmarks/input_pipeline.py --workers=0,1,2,4   # only what worker processes add: see input_workers.py
    python benchmarks/input_pipeline.py --augmentations     # only what pasted objects cost: see input_augmentation.py

Both pipelines get the same images and the same drawn flips, scales and crops, and do all of an image's work in one
thread: bytes -> pixels in a padded uint8 frame and boxes (ours), bytes -> normalised float32 pixels and boxes
(Pillow's, as DETR's transforms do it). Rates are per second of CPU time. The shares of useful pixels come from plans.
"""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import input_augmentation, input_workers  # noqa: E402
from configs.base import base  # noqa: E402
from deperceiver_jax.data.batches.geometry import Geometry, training_geometry, transform_boxes  # noqa: E402
from deperceiver_jax.data.batches.pixels import decode_image, place_image  # noqa: E402
from deperceiver_jax.data.batches.plan import training_buckets, training_plan  # noqa: E402

COCO = flags.DEFINE_string("coco", "", "A folder in COCO's layout, whose training photographs are loaded.")
ANNOTATIONS = flags.DEFINE_string("annotations", "", "A COCO annotation file, whose image sizes are planned.")
IMAGES = flags.DEFINE_integer("images", 80, "Number of photographs.")
WORKERS = flags.DEFINE_list("workers", [], "Numbers of worker processes to time; 0: threads of the training process.")
AUGMENTATIONS = flags.DEFINE_bool("augmentations", False, "Time the loader with pasted objects.")
BATCH = flags.DEFINE_integer("batch", 64, "Images in a batch of --workers.")
BATCHES = flags.DEFINE_integer("batches", 6, "Batches that --workers counts.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that every photograph is loaded; the median round counts.")

IMAGENET_MEAN = np.float32([0.485, 0.456, 0.406])
IMAGENET_STD = np.float32([0.229, 0.224, 0.225])

# How often each HEIGHTxWIDTH occurs among 160 images of COCO 2017, 80 of train and 80 of val. --annotations replaces
# this sample by the sizes of a whole split.
COCO_SIZES = {
    34: "480x640",
    21: "427x640",
    17: "640x480",
    10: "426x640",
    6: "375x500 428x640",
    4: "333x500",
    3: "424x640 640x426",
    2: "374x500 425x640 429x640 449x640 640x425 640x427 640x428",
    1: (
        "140x213 240x320 302x400 320x640 332x500 334x500 336x448 346x500 357x500 359x640 368x640 370x500 383x640 "
        "409x640 418x640 420x640 421x640 433x640 444x640 457x640 461x614 464x640 469x469 478x640 479x640 482x640 "
        "483x640 484x640 486x500 489x640 498x640 500x333 500x375 500x389 512x640 593x600 600x450 640x358 640x359 "
        "640x449 640x460 640x478"
    ),
}


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Something with a photograph's statistics, uint8 [height, width, 3]: noise of all scales, colours, and edges.

    The exponent is chosen so that JPEGs are as large as COCO's, which are 150 kB.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / max(height, width)
    planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(4, height, width))) / frequency**1.35, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    image = 120 + 45 * planes[0][..., None] + 20 * np.moveaxis(planes[1:], 0, -1)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        bottom, right = top + rng.integers(4, height // 3 + 5), left + rng.integers(4, width // 3 + 5)
        image[top:bottom, left:right] += rng.normal(0, 50, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """JPEG with COCO's usual quality and chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pillow_pixels(data: bytes, geometry: Geometry, example: int) -> np.ndarray:
    """One image through DETR's steps with Pillow, uint8 [h, w, 3]: decode, flip, (resize, crop,) resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if geometry.flip[example]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if geometry.cropped[example]:
        image = _resize(image, geometry.resized[example])
        (top, left), (height, width) = geometry.corner[example].tolist(), geometry.extent[example].tolist()
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(_resize(image, geometry.size[example]))


def _resize(image, size):
    return image.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR)


def pillow_example(data: bytes, boxes: np.ndarray, geometry: Geometry, example: int):
    """What a DETR data loader makes of an image: (normalised float32 [3, h, w], boxes)."""
    image = pillow_pixels(data, geometry, example).astype(np.float32) / 255
    image = (image - IMAGENET_MEAN) / IMAGENET_STD
    return np.ascontiguousarray(image.transpose(2, 0, 1)), transform_boxes(boxes, geometry, example)


def our_example(data: bytes, boxes: np.ndarray, geometry: Geometry, example: int, window, frame: np.ndarray):
    """What our loader makes of an image: its pixels in a padded frame, and boxes."""
    place_image(frame, decode_image(data), geometry.flip[example], window, geometry.size[example])
    return frame, transform_boxes(boxes, geometry, example)


def images_per_second(data: list[bytes], sizes: np.ndarray, config: ConfigDict, rounds: int) -> tuple[float, float]:
    """(ours, Pillow's) images per second of CPU time, from the median round of each, the two taking turns."""
    buckets = training_buckets(sizes, config)
    boxes = [np.float32([[0, 0, w / 2, h / 2], [w / 4, h / 4, w, h]] * 4) for h, w in sizes]
    times = []
    for epoch in range(rounds + 1):
        geometry = training_geometry(sizes, 0, epoch, config)
        windows = geometry.window()
        fits = (geometry.size[:, None] <= buckets).all(-1)
        frames = buckets[np.where(fits, buckets.prod(1), np.inf).argmin(1)]
        start = time.process_time()
        for i, jpeg in enumerate(data):
            our_example(jpeg, boxes[i], geometry, i, windows[i], np.empty((*frames[i], 3), np.uint8))
        middle = time.process_time()
        for i, jpeg in enumerate(data):
            pillow_example(jpeg, boxes[i], geometry, i)
        times.append((middle - start, time.process_time() - middle))
    ours, pillow = np.median(times[1:], axis=0)  # the first round warms up
    return len(data) / ours, len(data) / pillow


def useful_shares(sizes: np.ndarray, config: ConfigDict) -> dict[str, float]:
    """Share of loaded pixels that are image, over one epoch of training, by the way of padding."""
    outputs = training_geometry(sizes, 0, 1, config).size
    useful = outputs.prod(1, dtype=np.int64)
    shares = {f"every image padded to {config.max_size} x {config.max_size}": useful.mean() / config.max_size**2}
    for batch_size in (16, 64):
        order = np.random.default_rng(0).permutation(len(sizes))[: len(sizes) // batch_size * batch_size]
        batches = outputs[order].reshape(-1, batch_size, 2)
        padded = batches.max(1).prod(1, dtype=np.int64).sum() * batch_size
        shares[f"random batches of {batch_size}, padded to their largest"] = useful[order].sum() / padded
    for count in (1, 5, 8):
        buckets = training_buckets(sizes, ConfigDict({**config, "buckets": count}))
        plan = training_plan(outputs, buckets, 0, 1, config.batch_size)
        padded = buckets[plan.bucket].prod(1, dtype=np.int64).sum() * config.batch_size
        shares[f"planned batches of {config.batch_size}, {count} bucket{'s' * (count > 1)}"] = (
            useful[plan.example].sum() / padded
        )
    return shares


def photographs(folder: str, count: int) -> list[bytes]:
    """The first `count` training images of a COCO folder; without a folder, generated ones of COCO's sizes."""
    if folder:
        with open(Path(folder) / "annotations" / "instances_train2017.json") as file:
            names = sorted(image["file_name"] for image in json.load(file)["images"])[:count]
        return [(Path(folder) / "train2017" / name).read_bytes() for name in names]
    sizes = np.random.default_rng(0).permutation(coco_sizes())[:count]
    return [encode_jpeg(photograph(height, width, seed)) for seed, (height, width) in enumerate(sizes.tolist())]


def coco_sizes() -> np.ndarray:
    """The measured sample of COCO's image sizes, int32 [160, 2]."""
    counted = [(count, size.split("x")) for count, sizes in COCO_SIZES.items() for size in sizes.split()]
    counts, sizes = zip(*counted, strict=True)
    return np.repeat(np.array(sizes, np.int32), counts, axis=0)


def planned_sizes(annotations: str) -> tuple[np.ndarray, str]:
    """(sizes of a large data set, where they come from)."""
    if annotations:
        with open(annotations) as file:
            sizes = [(image["height"], image["width"]) for image in json.load(file)["images"]]
        return np.array(sizes, np.int32), f"the {len(sizes)} images of {Path(annotations).name}"
    sample = coco_sizes()
    drawn = np.random.default_rng(0).integers(0, len(sample), 20_000)
    return sample[drawn], f"20000 images drawn from the sizes of {len(sample)} images of COCO 2017"


def main(_) -> None:
    config = base().data
    data = photographs(COCO.value, IMAGES.value)
    sizes = np.array([decode_image(jpeg).shape[:2] for jpeg in data], np.int32)
    if WORKERS.value:
        config = ConfigDict({**config, "batch_size": BATCH.value})
        input_workers.report(data, sizes, config, [int(count) for count in WORKERS.value], BATCHES.value)
        return
    if AUGMENTATIONS.value:
        input_augmentation.report(data, sizes, config, ROUNDS.value)
        return
    ours, pillow = images_per_second(data, sizes, config, ROUNDS.value)
    print(
        f"{len(data)} {'photographs of ' + COCO.value if COCO.value else 'generated photographs'}, training transforms"
    )
    print(f"  our loader        {ours:7.1f} images/s per core")
    print(f"  Pillow            {pillow:7.1f} images/s per core")
    print(f"  ratio             {ours / pillow:7.2f}")
    sizes, origin = planned_sizes(ANNOTATIONS.value)
    print(f"Useful pixels in training, {origin}")
    for way, share in useful_shares(sizes, config).items():
        print(f"  {way:<50} {share:6.1%}")


if __name__ == "__main__":
    app.run(main)

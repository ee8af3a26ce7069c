"""What `deperceiver predict` does."""

import itertools
import json
import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from deperceiver_jax.data.batches.loader import image_batches
from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.data.image_header import exif_orientation
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import coco_results
from deperceiver_jax.evaluation.evaluate import detect, make_detect_step
from deperceiver_jax.files import require_writable, write_whole
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import load_for_command
from deperceiver_jax.sharding import make_mesh, replicated
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.fonts import readable

KEPT_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # pictures of other kinds become .png
FORMATS = set("AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM PSD SGI TGA TIFF WEBP".split())  # taken from a folder


def find_images(pattern: str) -> list[Path]:
    """The images of a folder, a file, or the files that a pattern matches, in order of name. Raises UserError for none.

    What is there by this very name comes first: [1] and * are letters of a name before they are a pattern.
    """
    place = os.path.expanduser(pattern)
    try:
        if os.path.isdir(place):
            kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
            found = [path for path in Path(place).iterdir() if kinds.get(path.suffix.lower()) in FORMATS]
        else:
            found = [Path(place)] if os.path.isfile(place) else map(Path, set(glob(place, recursive=True)))
        paths = sorted(path for path in found if path.is_file())
    except OSError as error:
        raise UserError(f"--images: {error.filename} cannot be read: {error.strerror}.") from error
    if not paths:
        raise UserError(f"--images: there is no image at {pattern}.")
    return paths


def output_files(paths: list[Path], output: Path) -> list[Path]:
    """Where each picture goes: under `output` as the images lie under their common folder, each by a name of its own.

    Raises UserError.
    """
    common = Path(os.path.commonpath([path.parent for path in paths]))
    if output.resolve() == common.resolve():
        raise UserError(f"--output: {output} is where the images are; take another folder.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is not a folder.")
    require_writable("--output", output)
    targets = [output / path.relative_to(common) for path in paths]
    taken = {target for target in targets if target.suffix.lower() in KEPT_ENDINGS}
    for i, target in enumerate(targets):
        if target not in taken:
            names = (Path(f"{target}{f'-{k}' if k > 1 else ''}.png") for k in itertools.count(1))
            targets[i] = next(name for name in names if name not in taken)
            taken.add(targets[i])
    return targets


def predict(values: flags.FlagValues, config_arguments: Sequence[str]) -> None:
    """The program. values: flags of deperceiver_jax/predict.py; config_arguments: `--config...`. Raises UserError."""
    for name in ("images", "output"):
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")
    paths, output = find_images(values.images), Path(values.output).expanduser()
    targets = output_files(paths, output)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config, classes = loaded.config, loaded.classes

    keep_compiled(config.train.compilation_cache)
    mesh = make_mesh(config.mesh.model)
    detect_step = make_detect_step(loaded.skeleton.merge, config, mesh)
    print(f"Detecting with {stored.items} in {len(paths)} images.")
    batches = image_batches(paths, config.data, batch_size=config.eval.batch_size)
    arrays = jax.device_put(loaded.arrays, replicated(mesh))
    _, detections = detect(detect_step, arrays, batches, len(paths), mesh, "Detecting")

    name_of = readable(classes)
    # Nothing is written before every image has been read: a broken one has ended the program by now.
    keep = (detections.scores >= values.score_threshold) & np.isin(detections.labels, classes.slots)
    entries = []
    try:
        for i, (path, target) in enumerate(zip(paths, targets, strict=True)):
            scores, labels, boxes = (x[i][keep[i]] for x in detections)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            picture = draw_detections(decode_image(data, exif_orientation(data)), boxes, labels, scores, name_of)
            Image.fromarray(picture).save(target, quality=92)
            found = coco_results(Detections(scores[None], labels[None], boxes[None]), [i], classes)
            for entry, label in zip(found, labels.tolist(), strict=True):
                entries.append(entry | {"file_name": str(path), "category_name": classes.name(label)})
        write_whole(output / "detections.json", json.dumps(entries, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--output: {error.filename or output} cannot be written: {error.strerror}.") from error
    print(f"Wrote {len(paths)} pictures with {len(entries)} detections and {output}/detections.json.")

"""Detects objects in images of any size: draws their boxes, and writes them to detections.json.

    python predict.py --workdir=runs/x --images='photos/*.jpg' --output=out [--score_threshold=0.5]
    python predict.py --weights=DIR --images=photos --output=out

The config is the one that the run stored; --config.a.b=value changes a field of it, --config=FILE:VARIANT replaces it.
detections.json has COCO's results format, with the data set's category ids, and each detection's file and class name.
"""

import json
import os
import sys
from glob import glob
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from deperceiver_jax.data.batches.loader import image_batches
from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import coco_results
from deperceiver_jax.evaluation.evaluate import detect, make_detect_step
from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import define_detector_flags, load_for_command
from deperceiver_jax.sharding import make_mesh, replicated
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize.draw_boxes import draw_detections

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # what is taken from a folder


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("images", None, "A folder, or files as in 'photos/*.jpg'.", flag_values=values)
    flags.DEFINE_string("output", None, "The folder for the pictures and detections.json.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)


def find_images(pattern: str) -> list[Path]:
    """The images of a folder, or the files that a pattern matches, in order of name. Raises UserError for none."""
    place = Path(pattern).expanduser()
    if place.is_dir():
        paths = [path for path in place.iterdir() if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()]
    else:
        paths = [path for path in map(Path, glob(str(place), recursive=True)) if path.is_file()]
    if not paths:
        raise UserError(f"--images: there is no image at {pattern}.")
    return sorted(paths)


def output_files(paths: list[Path], output: Path) -> list[Path]:
    """Where each picture goes: under `output` as the images lie under their common folder. Raises UserError."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    if output.resolve() == common.resolve():
        raise UserError(f"--output: {output} is where the images are; take another folder.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is not a folder.")
    targets = [output / path.relative_to(common) for path in paths]
    return [target if target.suffix.lower() in IMAGE_ENDINGS else Path(f"{target}.png") for target in targets]


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
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

    # Nothing is written before every image has been read: a broken one has ended the program by now.
    keep = (detections.scores >= values.score_threshold) & np.isin(detections.labels, classes.slots)
    entries = []
    for i, (path, target) in enumerate(zip(paths, targets, strict=True)):
        scores, labels, boxes = (x[i][keep[i]] for x in detections)
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = draw_detections(decode_image(path.read_bytes()), boxes, labels, scores, classes.name)
        Image.fromarray(picture).save(target, quality=92)
        found = coco_results(Detections(scores[None], labels[None], boxes[None]), [i], classes)
        for entry, label in zip(found, labels.tolist(), strict=True):
            entries.append(entry | {"file_name": str(path), "category_name": classes.name(label)})
    (output / "detections.json").write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n")
    print(f"Wrote {len(paths)} pictures with {len(entries)} detections and {output}/detections.json.")


if __name__ == "__main__":
    sys.exit(run(main))

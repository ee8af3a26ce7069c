"""Trains DePerceiver+ on 500 pictures of small objects with and without pasted ones, and compares held-out AP.

    python benchmarks/augmentation.py --settings=none,paste --seeds=0,1,2

The pictures are the first 500 training pictures of the built-in data set `shapes/small`, written as a folder in COCO's
layout; AP is of its 200 held-out pictures. The detector is the row `deperceiver_plus` of configs/ladder.py, smaller.
Every run is one of train.py in OUTPUT/SETTING/deperceiver_plus/SEED: what is finished is not run again, so the same
command resumes, and more settings or seeds can be added. Writes OUTPUT/table.md.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import small_objects  # noqa: E402
from deperceiver_jax.data.datasets.shapes import drawing  # noqa: E402

ROW = "deperceiver_plus"
PICTURES = {"train": 500, "validation": 200}
FOLDERS = {"train": ("train2017", "instances_train2017.json"), "validation": ("val2017", "instances_val2017.json")}
FIELDS = [
    "--config.data.max_boxes=16",  # alone a picture has at most 8
    "--config.model.neck_blocks=0",
    "--config.model.decoder.num_layers=2",
    "--config.model.denoising.copies=1",
    "--config.train.eval_every=-1",
    "--config.train.checkpoint_every=350",
]
SETTINGS = {
    "none": [],
    "paste": ["--config.data.paste_objects=8", "--config.data.paste_max_side=16.0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", type=_names, default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=700, help="of 16 pictures each")
    parser.add_argument("--output", type=Path, default=Path("runs/augmentation"))
    parser.add_argument("--table_only", action="store_true", help="train nothing, tell what is there")
    arguments = parser.parse_args()

    folder = arguments.output / "pictures"
    fields = ["--config.data.name=coco_directory", f"--config.data.directory={folder.absolute()}"]
    fields += [*FIELDS, f"--config.train.num_steps={arguments.steps}"]
    if not arguments.table_only:
        write_pictures(folder)
        for seed, setting in itertools.product(arguments.seeds, arguments.settings):
            small_objects.train(ROW, seed, arguments.output / setting, fields + SETTINGS[setting])
    runs = {name: small_objects.read_rows(arguments.output / name, [ROW]).get(ROW) for name in arguments.settings}
    table = small_objects.make_table({name: found for name, found in runs.items() if found})
    (arguments.output / "table.md").write_text(table)
    print(table)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise argparse.ArgumentTypeError(f"no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return names


def write_pictures(folder: Path) -> None:
    """PICTURES of `shapes/small` in COCO's layout, the same JPEGs as the built-in data set's."""
    categories = [{"id": slot + 1, "name": name} for slot, name in enumerate(drawing.CLASSES)]
    for split, count in PICTURES.items():
        images, annotations = FOLDERS[split]
        file = folder / "annotations" / annotations
        if file.exists():
            continue
        (folder / images).mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        listed = {"images": [], "annotations": [], "categories": categories}
        for index in range(count):
            picture = drawing.draw(drawing.RECIPES["small"], split, index)
            name, (height, width) = f"{split}_{index:05d}.jpg", picture.image.shape[:2]
            (folder / images / name).write_bytes(drawing.encode(picture.image))
            listed["images"].append({"id": index + 1, "file_name": name, "height": height, "width": width})
            for box, label, area in zip(picture.boxes, picture.labels, picture.areas, strict=True):
                about = {"id": len(listed["annotations"]) + 1, "image_id": index + 1, "category_id": int(label) + 1}
                shape = {"bbox": [float(side) for side in box], "area": float(area), "iscrowd": 0}
                listed["annotations"].append(about | shape)
        file.write_text(json.dumps(listed))


if __name__ == "__main__":
    main()

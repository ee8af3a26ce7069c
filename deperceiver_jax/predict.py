"""Detects objects in pictures and videos of any size: draws their boxes, and writes them to detections.json.

    deperceiver predict --workdir=runs/x --images photos/*.jpg --output=out [--score_threshold=0.5]
    deperceiver predict --weights=DIR --images=photos --images=clip.mp4 --output=out --classes=person,dog
    find . -name '*.png' | deperceiver predict --workdir=runs/x --images=- --output=out --format=coco,csv,yolo
    deperceiver predict --weights=DIR --images=test2017 --annotations=image_info_test-dev2017.json --output=out --nodraw

The config is the one that the run stored; --config.a.b=value changes a field of it, --config=NAME:VARIANT replaces it.
detections.json has COCO's results format, with the data set's category ids, and each detection's file and class name.
A file that cannot be read is named and counted, and makes the status 1 at the end. Ctrl-C keeps what is done. In a
clone, `python predict.py` is the same; in Python, see deperceiver_jax.load.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags
from deperceiver_jax.program.huge_pages import use_huge_pages

IMAGES = "Files, folders (their pictures, without folders below), patterns or videos; - for a list on standard input."


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_multi_string("images", [], IMAGES, flag_values=values)
    values["images"].help = IMAGES  # which absl adds to
    flags.DEFINE_string("output", None, "The folder for the pictures and detections.json.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)
    flags.DEFINE_list("classes", [], "Only these, names or category ids; all without it.", flag_values=values)
    flags.DEFINE_list(
        "format",
        ["coco"],
        "Of the results: coco (detections.json), csv (detections.csv), yolo (labels/*.txt, classes.txt).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "annotations", None, "A COCO-format file whose image ids the results get, by file name.", flag_values=values
    )
    flags.DEFINE_bool("draw", True, "Write the pictures and videos with their boxes.", flag_values=values)
    flags.DEFINE_bool("frames", False, "Draw a video's frames into pictures, not a video.", flag_values=values)
    flags.DEFINE_bool("save_crops", False, "Write what is in each box to crops/CLASS/.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.prediction.predict import predict  # not above: it starts JAX, which no help text needs

    predict(values, config_arguments)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(run(main))

"""Detects objects in images of any size: draws their boxes, and writes them to detections.json.

    deperceiver predict --workdir=runs/x --images='photos/*.jpg' --output=out [--score_threshold=0.5]
    deperceiver predict --weights=DIR --images=photos --output=out

The config is the one that the run stored; --config.a.b=value changes a field of it, --config=NAME:VARIANT replaces it.
detections.json has COCO's results format, with the data set's category ids, and each detection's file and class name.
In a clone, `python predict.py` is the same.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("images", None, "A folder, or files as in 'photos/*.jpg'.", flag_values=values)
    flags.DEFINE_string("output", None, "The folder for the pictures and detections.json.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Detections below it are left out.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.prediction.predict import predict  # not above: it starts JAX, which no help text needs

    predict(values, config_arguments)


if __name__ == "__main__":
    sys.exit(run(main))

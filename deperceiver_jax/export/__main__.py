"""Writes a trained detector as one file for other runtimes, after comparing it with JAX.

    deperceiver export --workdir=runs/x --format=onnx --output=x.onnx [--batch=1|N|dynamic]
    deperceiver export --weights=DIR --format=stablehlo --output=x.stablehlo [--size=HxW|dynamic]

The file takes RGB pictures as bytes, with their sizes, and gives boxes in pixels of the original pictures, scores and
labels; docs/export.md shows how. Before it gets its name it is run beside JAX, on drawn pictures of several sizes and
on the run's evaluation split, and a file that answers otherwise is not written.
"""

import sys

from absl import flags

from deperceiver_jax.export.choices import AP_TOLERANCES, DYNAMIC, ENDINGS
from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("output", None, "The file to be written: .onnx or .stablehlo.", flag_values=values)
    flags.DEFINE_enum("format", "onnx", list(ENDINGS), "What the file is.", flag_values=values)
    flags.DEFINE_string("batch", "1", "Pictures that the file takes at one time, or dynamic.", flag_values=values)
    flags.DEFINE_string("size", DYNAMIC, "HEIGHTxWIDTH of their frame in pixels, or dynamic.", flag_values=values)
    flags.DEFINE_enum("precision", "float32", list(AP_TOLERANCES), "What the file computes in.", flag_values=values)
    flags.DEFINE_integer(
        "check_images", None, "Compare on so many pictures of the split; 0: none.", flag_values=values, lower_bound=0
    )
    flags.DEFINE_float("score_threshold", 0.5, "Detections above it must be the same.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.export.export_detector import export_detector  # starts JAX, which no help text needs

    export_detector(values, config_arguments)


if __name__ == "__main__":
    sys.exit(run(main))

"""Opens a page on this machine to try a detector on pictures in a browser.

    deperceiver app --workdir=runs/x [--port=8000]
    deperceiver app --weights=DIR --host=0.0.0.0

Pictures are dropped on the page or chosen; a slider and a class filter say which boxes are shown; a touch on a box
shows where its query looked; what was found is downloaded as COCO's results. Nothing is stored. Only this machine
reaches the page unless --host says otherwise, and whoever reaches it may use it. Ctrl-C ends it.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("host", "127.0.0.1", "Who may connect: an address of this machine.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "Where the page is; 0: any free port.", flag_values=values)
    flags.DEFINE_float("score_threshold", 0.5, "Where the page's slider stands at first.", flag_values=values)
    flags.DEFINE_integer("max_waiting", 32, "Pictures at one time; the next gets status 503.", flag_values=values)
    flags.DEFINE_integer("max_megabytes", 20, "Of a picture's file.", flag_values=values)
    flags.DEFINE_integer("max_megapixels", 50, "Of a picture.", flag_values=values)
    flags.DEFINE_integer("timeout", 120, "Seconds for an upload, and for its answer.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.app.serve import serve  # not above: it starts JAX, which no help text needs

    serve(values, config_arguments)


if __name__ == "__main__":
    sys.exit(run(main))

"""Evaluates a detector on a split and prints COCO's statistics.

    deperceiver eval --workdir=runs/x [--checkpoint=latest|best|STEP] [--split=validation] [--report]
    deperceiver eval --weights=DIR --config.data.directory=/data/coco

The config is the one that the run stored; --config.a.b=value changes a field of it, --config=NAME:VARIANT replaces it.
metrics.json and detections.json (COCO's results format) go to <workdir>/eval/<step>, or to --output, and with --report
report.html, which shows them with charts and pictures in a browser. In a clone, `python eval.py` is the same.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags, define_process_flags
from deperceiver_jax.program.huge_pages import use_huge_pages


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("split", None, "Default: config.data.eval_split.", flag_values=values)
    flags.DEFINE_string("output", None, "Where the files go.", flag_values=values)
    flags.DEFINE_bool("report", False, "Also write report.html.", flag_values=values)
    define_process_flags(values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    # Not above: they start JAX, which no help text needs.
    from deperceiver_jax.evaluation.evaluate_detector import evaluate_detector
    from deperceiver_jax.report import require_libraries

    if values.report:
        require_libraries("--report")
    written = evaluate_detector(values, config_arguments)
    if written is not None and values.report:
        from deperceiver_jax.report.page import write_report

        file = written.output / "report.html"
        data = (written.source, written.metrics, written.results, written.config)
        write_report(file, *data, split=written.split, step=written.output.name)
        print(f"Wrote {file}.")


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(run(main))

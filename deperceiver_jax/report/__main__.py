"""Writes the report of an evaluation that was made: tables, charts and pictures in one HTML file.

    deperceiver report --workdir=runs/x [--output=report.html]

It reads the run's last `eval/<step>`, beside whose files it puts report.html, and the pictures of the run's data set.
"""

import sys

from absl import flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, require_file, require_readable
from deperceiver_jax.program.command_line import parse_config, parse_flags, run
from deperceiver_jax.report import require_libraries
from deperceiver_jax.runs.stored_evaluation import newest_evaluation, read_json, require_evaluated
from deperceiver_jax.runs.workdir import CONFIG, read_config


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "An evaluated run.", flag_values=values)
    flags.DEFINE_string("output", None, "The file to write, an .html.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    if not values.workdir:
        raise UserError("--workdir is missing: a run that was evaluated.")
    require_libraries("The report")
    # Not above: they take a second, which no help text needs.
    from deperceiver_jax.data import open_source
    from deperceiver_jax.report.page import write_report

    workdir = as_path(values.workdir)
    require_readable("--workdir", workdir)
    config = parse_config(config_arguments, read_config(workdir / CONFIG))
    evaluation = newest_evaluation(workdir)
    page = values.output or evaluation / "report.html"
    output = require_file("--output" if values.output else "--workdir", page, (".html",))
    metrics, results = (read_json(evaluation / name) for name in ("metrics.json", "detections.json"))
    if "by_class" not in metrics:
        raise UserError(f"{evaluation}/metrics.json was written before 0.2.0; run eval.py again, with --report.")
    source = open_source(config.data, config.data.eval_split)
    require_evaluated(evaluation, source)
    write_report(output, source, metrics, results, config, split=config.data.eval_split, step=evaluation.name)
    print(f"Wrote {output}.")


if __name__ == "__main__":
    sys.exit(run(main))

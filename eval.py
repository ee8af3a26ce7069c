"""Evaluates a detector on a split and prints COCO's statistics.

    python eval.py --workdir=runs/x [--checkpoint=latest|best|STEP] [--split=validation] [--report]
    python eval.py --weights=DIR --config.data.directory=/data/coco

The config is the one that the run stored; --config.a.b=value changes a field of it, --config=FILE:VARIANT replaces it.
metrics.json and detections.json (COCO's results format) go to <workdir>/eval/<step>, or to --output, and with --report
report.html, which shows them with charts and pictures in a browser.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import metric_table
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step, write_results
from deperceiver_jax.files import require_writable
from deperceiver_jax.program import processes
from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.report import require_libraries
from deperceiver_jax.runs.load_detector import define_detector_flags, load_for_command
from deperceiver_jax.sharding import make_mesh, replicated


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("split", None, "Default: config.data.eval_split.", flag_values=values)
    flags.DEFINE_string("output", None, "Where the files go.", flag_values=values)
    flags.DEFINE_bool("report", False, "Also write report.html.", flag_values=values)
    processes.define_flags(values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    processes.join(values)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config = loaded.config
    split = values.split or config.data.eval_split
    output = (
        Path(values.output).expanduser() if values.output else default_output(stored, split, config.data.eval_split)
    )
    first = jax.process_index() == 0
    if values.report:
        require_libraries("--report")
    if first:
        require_writable("--output", output)
    source = open_source(config.data, split)
    require_same_classes(loaded.classes, str(stored.items), source.classes, f"the data set's split {split}")
    if values.report and not source.annotated:
        raise UserError(f"--report needs annotations, which split {split} does not have.")

    keep_compiled(config.train.compilation_cache)
    mesh = make_mesh(config.mesh.model)
    detect_step = make_detect_step(loaded.skeleton.merge, config, mesh)
    if first:
        devices = f"{jax.device_count()} {jax.devices()[0].platform} device{'s' if jax.device_count() > 1 else ''}"
        print(f"Evaluating {stored.items} on {len(source)} images of {config.data.name}, {split}, on {devices}.")
    arrays = jax.device_put(loaded.arrays, replicated(mesh))
    metrics, results = evaluate(detect_step, arrays, source, config, mesh)

    if first:
        write_results(output, metrics, results)
        if metrics:
            print(metric_table(metrics, config.eval.max_detections_per_class))
            print(f"Wrote {output}/metrics.json and {len(results)} detections to {output}/detections.json.")
        else:
            print(f"Wrote {len(results)} detections to {output}/detections.json; split {split} has no annotations.")
    if first and values.report:
        from deperceiver_jax.report.page import write_report

        write_report(output / "report.html", source, metrics, results, config, split=split, step=output.name)
        print(f"Wrote {output}/report.html.")


def default_output(stored, split: str, eval_split: str) -> Path:
    """<workdir>/eval/<step>; other splits than the run's own have a directory of their own below it."""
    output = stored.directory / "eval" / ("weights" if stored.step is None else str(stored.step))
    return output if split == eval_split else output / split


if __name__ == "__main__":
    sys.exit(run(main))

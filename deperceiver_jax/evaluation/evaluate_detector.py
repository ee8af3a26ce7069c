"""What `deperceiver eval` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from deperceiver_jax.data import Source, open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import metric_table
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step, write_results
from deperceiver_jax.files import as_path, require_writable
from deperceiver_jax.program import processes
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import load_for_command
from deperceiver_jax.runs.stored_detector import StoredDetector
from deperceiver_jax.runs.stored_evaluation import evaluated_data
from deperceiver_jax.runs.workdir import data_fingerprint, flat_fields, tell_apart
from deperceiver_jax.sharding import make_mesh, replicated

# Beginnings of the fields that an evaluation depends on, but for the data, which are known by what they are.
DECISIVE = ("model.", "eval.", "data.eval_", "data.exif_orientation", "precision")
OF_NO_EFFECT = ("eval.batch_size", "data.eval_buckets", "data.eval_split")


class Written(NamedTuple):
    """What was evaluated, and where its files are."""

    output: Path
    source: Source
    split: str
    config: ConfigDict
    metrics: dict[str, Any]
    results: list[dict]


def evaluate_detector(values: flags.FlagValues, config_arguments: Sequence[str]) -> Written | None:
    """The program. values: the flags of deperceiver_jax/eval.py; config_arguments: `--config...`. Raises UserError."""
    processes.join(values)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config = loaded.config
    split = values.split or config.data.eval_split
    if not values.output and stored.items.is_file():
        raise UserError(
            f"--output is needed: {values.weights} is no run of this package that could keep an evaluation."
        )
    output = as_path(values.output) if values.output else default_output(stored, split, config)
    first = jax.process_index() == 0
    if first:
        require_writable("--output", output)
    source = open_source(config.data, split)
    require_same_classes(loaded.classes, str(stored.items), source.classes, f"the data set's split {split}")
    data = data_fingerprint(source)
    before = evaluated_data(output) if first and not values.output else None
    if before is not None and before != data:
        told, other = tell_apart(before, data)
        raise UserError(f"--output is needed: {output} keeps an evaluation of other data: {told}, not {other}.")
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

    if not first:
        return None
    write_results(output, metrics, results, data)
    if metrics:
        print(metric_table(metrics, config.eval.max_detections_per_class))
        print(f"Wrote {output}/metrics.json and {len(results)} detections to {output}/detections.json.")
    else:
        print(f"Wrote {len(results)} detections to {output}/detections.json; split {split} has no annotations.")
    return Written(output, source, split, config, metrics, results)


def default_output(stored: StoredDetector, split: str, config: ConfigDict) -> Path:
    """<workdir>/eval/<step>; other splits than the run's own have a directory of their own below it.

    Raises UserError where `config`, the whole one, is not what the run evaluates with: its evaluation stays what it is.
    """
    own = stored.read_config()
    before = flat_fields(own)
    for name, value in flat_fields(config).items():
        decides = name.startswith(DECISIVE) and name not in OF_NO_EFFECT
        if decides and before.get(name, value) != value:
            raise UserError(
                f"--output is needed: config.{name} is {value}, and {stored.directory}/eval keeps what was evaluated "
                f"with {before[name]}."
            )
    output = stored.directory / "eval" / ("weights" if stored.step is None else str(stored.step))
    return output if split == own.data.eval_split else output / split

"""Writes a trained detector as one file for other runtimes, after comparing it with JAX.

    python -m deperceiver_jax.export --workdir=runs/x --format=onnx --output=x.onnx [--batch=1|N|dynamic]
    python -m deperceiver_jax.export --weights=DIR --format=stablehlo --output=x.stablehlo [--size=HxW|dynamic]

The file takes RGB pictures as bytes, with their sizes, and gives boxes in pixels of the original pictures, scores and
labels; docs/export.md shows how. Before it gets its name it is run beside JAX, on drawn pictures of several sizes and
on the run's evaluation split, and a file that answers otherwise is not written.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from deperceiver_jax import __version__
from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.data.datasets.source import Source
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.coco_metric import coco_metric, coco_results, ground_truth
from deperceiver_jax.export.compare import TOLERANCE, Comparison
from deperceiver_jax.export.pictures import drawn_batches, split_batches
from deperceiver_jax.export.program import DYNAMIC, Answers, Sizes, file_program, reference_program, sizes_of
from deperceiver_jax.export.stablehlo_file import open_stablehlo, write_stablehlo
from deperceiver_jax.files import require_writable, written_whole
from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, define_detector_flags, load_for_command
from deperceiver_jax.runs.workdir import config_text
from deperceiver_jax.structures import Detections

ENDINGS = {"onnx": ".onnx", "stablehlo": ".stablehlo"}
AP_TOLERANCES = {"float32": TOLERANCE, "float16": 0.003}  # on the split


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
    output = output_file(values.output, values.format)
    write, open_file = writer_and_reader(values.format)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config = loaded.config
    if config.precision != "float32":
        print(f"The run computes in {config.precision}; the file is compared with the same parameters in float32.")
        config.precision = "float32"
    if values.precision != "float32" and values.check_images == 0:
        raise UserError(
            f"--precision={values.precision} is compared by its AP alone; --check_images=0 leaves out that."
        )
    sizes = sizes_of(loaded, *read_sizes(values.batch, values.size))
    source = None if values.check_images == 0 else open_split(loaded, str(stored.items))
    keep_compiled(config.train.compilation_cache)
    free = f"any size that {sizes.multiple} divides, of at least {sizes.multiple * sizes.least}"
    frame = "x".join(map(str, sizes.frame)) if sizes.frame else free
    print(f"Exporting {stored.items} ({config.model.name}): batches of {values.batch}, frames of {frame}.", flush=True)

    with written_whole(output) as partial, jax.default_device(jax.local_devices(backend="cpu")[0]):
        began = time.perf_counter()
        try:
            write(partial, file_program(loaded, values.precision), sizes, metadata(loaded, sizes))
        except jax.errors.InconclusiveDimensionOperation as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--size: this detector takes no frames of any size ({reason}); give HEIGHTxWIDTH."
            ) from error
        seconds, megabytes = time.perf_counter() - began, partial.stat().st_size / 1e6
        for sentence in compare(output.name, open_file(partial), loaded, sizes, source, values):
            print(sentence, flush=True)
    print(f"Wrote {output}: {megabytes:.1f} MB, written in {seconds:.1f} s.")


def output_file(flag: str | None, format: str) -> Path:
    """Raises UserError for a name that the file cannot have."""
    if flag is None:
        raise UserError("--output is needed: the file to be written.")
    output = Path(flag).expanduser()
    if output.suffix != ENDINGS[format]:
        raise UserError(f"--output: {output} is to end in {ENDINGS[format]}, as --format={format} is asked for.")
    if output.exists():
        raise UserError(f"--output: {output} exists already.")
    require_writable("--output", output)
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}.")
    return output


def writer_and_reader(format: str) -> tuple[Callable, Callable]:
    if format == "stablehlo":
        return write_stablehlo, open_stablehlo
    try:
        import onnxruntime  # noqa: F401

        from deperceiver_jax.export.onnx_file import open_onnx, write_onnx
    except ImportError as error:
        raise UserError(f"--format=onnx needs {error.name}: pip install 'deperceiver_jax[onnx]'.") from None
    return write_onnx, open_onnx


def read_sizes(batch: str, size: str) -> tuple[int | None, tuple[int, int] | None]:
    """(pictures at one time, frame) of --batch and --size; None is any. Raises UserError."""
    if batch != DYNAMIC and not re.fullmatch(r"[1-9]\d{0,3}", batch):
        raise UserError(f"--batch is {batch!r}; it can be a number of pictures or {DYNAMIC}.")
    if size != DYNAMIC and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
        raise UserError(f"--size is {size!r}; it can be HEIGHTxWIDTH in pixels, as in 800x1344, or {DYNAMIC}.")
    count = None if batch == DYNAMIC else int(batch)
    if size == DYNAMIC:
        return count, None
    height, width = map(int, size.split("x"))
    return count, (height, width)


def open_split(loaded: LoadedDetector, items: str) -> Source:
    split = loaded.config.data.eval_split
    try:
        source = open_source(loaded.config.data, split)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; --check_images=0 exports without the split's pictures.") from None
    require_same_classes(loaded.classes, items, source.classes, f"the data set's split {split}")
    return source


def metadata(loaded: LoadedDetector, sizes: Sizes) -> dict[str, str]:
    """What a reader of the file needs to know: classes by slot, how pictures are resized, where it comes from."""
    data = loaded.config.data
    return {
        "detector": loaded.config.model.name,
        "classes": loaded.classes.to_json(),
        "short_side": str(data.eval_scale),
        "longest_side": str(data.eval_max_size),
        "multiple": str(sizes.multiple),
        "least": str(sizes.multiple * sizes.least),
        "config": config_text(loaded.config),
        "version": __version__,
    }


def compare(
    name: str, run_file: Callable[..., Answers], loaded: LoadedDetector, sizes: Sizes, source: Source | None, values
):
    """Sentences about how far the file is from JAX. Raises UserError where it is too far."""
    reference = reference_program(loaded)
    how = (name, loaded.classes, values.score_threshold, values.precision == "float32")
    drawn = Comparison(*how)
    for batch in drawn_batches(sizes, loaded.config):
        inputs = batch.image, batch.size, batch.original_size
        drawn.add(batch, lambda example: f"drawn picture {example}", *reference(*inputs), run_file(*inputs))
    yield f"Beside JAX, on drawn pictures: {drawn}."
    if source is None:
        return
    split, total = loaded.config.data.eval_split, len(source)
    count = min(values.check_images or total, total)
    if count < total:
        print(f"The split {split} has {total} pictures, of which the first {count} are compared.")
    compared = Comparison(*how)
    expected_of, found_of = dict[int, Detections](), dict[int, Detections]()
    with tqdm(total=count, desc="Comparing", unit=" images", disable=None) as progress:
        for batch in split_batches(source, count, sizes, loaded.config):
            inputs = batch.image, batch.size, batch.original_size
            (expected, lead), found = reference(*inputs), run_file(*inputs)
            compared.add(batch, source.filename, expected, lead, found)
            for row in np.flatnonzero(batch.example >= 0):
                for answers, kept in ((expected, expected_of), (found, found_of)):
                    parts = (answers.scores, answers.labels, answers.boxes)
                    kept[int(batch.example[row])] = Detections(*(part[row].copy() for part in parts))
            progress.update(int((batch.example >= 0).sum()))
    ours, theirs = (average_precision(of_one, source, loaded) for of_one in (expected_of, found_of))
    if not abs(ours - theirs) <= AP_TOLERANCES[values.precision]:
        raise UserError(
            f"{name} is not written: its AP on {count} pictures of {split} is {theirs:.5f}, and JAX's {ours:.5f}."
        )
    yield f"Beside JAX, on the split {split}: {compared}; AP {theirs:.5f}, and {ours:.5f} by JAX."


def average_precision(detections_of: dict[int, Detections], source: Source, loaded: LoadedDetector) -> float:
    """COCO's AP of the detections in the first pictures of a split."""
    rows = [detections_of[example] for example in range(len(detections_of))]
    detections = Detections(*(np.stack(column) for column in zip(*rows, strict=True)))
    evaluation = loaded.config.eval
    image_ids = source.image_ids[: len(rows)]
    truth, seen = ground_truth(source), set(np.asarray(image_ids).tolist())
    truth["images"] = [image for image in truth["images"] if image["id"] in seen]
    truth["annotations"] = [box for box in truth["annotations"] if box["image_id"] in seen]
    results = coco_results(detections, image_ids, source.classes, evaluation.score_threshold)
    limits = dict(max_detections=evaluation.max_detections_per_class, area_scale=source.area_scale)
    return coco_metric(truth, results, **limits)["AP"]


if __name__ == "__main__":
    sys.exit(run(main))

"""From a trained detector to a file that has answered as JAX does."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl.flags import FlagValues
from tqdm import tqdm

from deperceiver_jax import __version__
from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.data.datasets.source import Source
from deperceiver_jax.errors import UserError, check_between
from deperceiver_jax.evaluation.coco_metric import coco_metric, coco_results, ground_truth
from deperceiver_jax.export.check import Comparison
from deperceiver_jax.export.choices import AP_TOLERANCES, DYNAMIC, ENDINGS
from deperceiver_jax.export.pictures import drawn_batches, split_batches
from deperceiver_jax.export.program import Answers, Sizes, file_program, reference_program, sizes_of
from deperceiver_jax.export.stablehlo_file import open_stablehlo, write_stablehlo
from deperceiver_jax.files import as_path, is_bucket, require_writable, written_whole
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.runs.workdir import config_text
from deperceiver_jax.structures import Detections


def export_detector(values: FlagValues, config_arguments: Sequence[str]) -> None:
    """Writes and compares what the flags of export ask for. Raises UserError."""
    check_between("--score_threshold", values.score_threshold, 0, 1)
    output = output_file(values.output, values.format)
    write, open_file = writer_and_reader(values.format)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config = loaded.config
    if config.precision != "float32":
        print(f"The run computes in {config.precision}; the file is compared with the same parameters in float32.")
        config.precision = "float32"
    if (values.format, values.precision) == ("onnx", "bfloat16"):
        raise UserError(
            "--precision=bfloat16: ONNX's convolution takes no bfloat16 before version 22 of its operators, and "
            "onnxruntime has none for it on the CPU; take float16, or --format=stablehlo."
        )
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
    output = as_path(flag)
    if output.suffix != ENDINGS[format]:
        raise UserError(f"--output: {output} is to end in {ENDINGS[format]}, as --format={format} is asked for.")
    require_writable("--output", output)
    if output.exists():
        raise UserError(f"--output: {output} exists already.")
    if not is_bucket(output) and not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}.")
    return output


def writer_and_reader(format: str) -> tuple[Callable, Callable]:
    if format == "stablehlo":
        return write_stablehlo, open_stablehlo
    try:
        import onnxruntime  # noqa: F401

        from deperceiver_jax.export.onnx_file import open_onnx, write_onnx
    except ImportError as error:
        raise UserError(f"--format=onnx needs {error.name}: pip install '.[onnx]'.") from None
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

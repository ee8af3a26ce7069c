"""The evaluation loop that train.py and eval.py share: one split through the detector -> COCO's statistics."""

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orjson
from jax.sharding import Mesh
from jaxtyping import Array, Int32
from ml_collections import ConfigDict
from tqdm import tqdm

from deperceiver_jax.data.batches.loader import EvaluationBatches
from deperceiver_jax.data.batches.views import Views, check_views, has_several, plan_views
from deperceiver_jax.errors import UserError, check_at_least, check_between
from deperceiver_jax.evaluation.coco_metric import coco_metric, coco_results, ground_truth
from deperceiver_jax.evaluation.merge import merge_views
from deperceiver_jax.evaluation.postprocess import postprocess
from deperceiver_jax.files import make_folder, reason, write_whole
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.runs.workdir import DATA
from deperceiver_jax.sharding import gather, replicated, shard_batch, whole_batch
from deperceiver_jax.structures import Batch, Detections, Predictions

Answer = Callable[[Predictions, Int32[Array, "B 2"]], Detections]  # of the original sizes; an image is a row
DetectStep = Callable[[dict[str, Array], Batch], tuple[Int32[Array, " B"], Detections]]


def make_detect_step(merge: Callable, config: ConfigDict, mesh: Mesh, answer: Answer | None = None) -> DetectStep:
    """`detect_step(arrays, batch) -> (example, detections)`: compiled once per size bucket, wherever it is called from.

    merge: arrays by path -> the detector that computes with them. The batch is split over all devices; the answer is
    gathered, so every process holds all of it. answer: what is kept of the predictions; without it, the last layer's
    detections (`postprocess`). Raises UserError when config.eval is out of range.
    """
    for name in ("batch_size", "max_detections", "max_detections_per_class"):
        check_at_least(f"config.eval.{name}", config.eval[name], 1)
    check_between("config.eval.score_threshold", config.eval.score_threshold, 0, 1)
    check_views(config.eval)
    classification = build_classification(config.loss)
    answer = answer or functools.partial(
        postprocess, classification=classification, max_detections=config.eval.max_detections
    )

    @traced_for(mesh)
    def detect_step(arrays, batch):
        image, pixel_valid = normalize_images(batch.image, batch.size)
        predictions = merge(gather(arrays, mesh))(image, pixel_valid)
        classification.check_width(predictions.logits.shape[-1], config.model.num_classes)
        return batch.example, answer(predictions, batch.original_size)

    return jax.jit(detect_step, out_shardings=replicated(mesh))


def detect(
    detect_step: DetectStep,
    arrays: dict[str, Array],
    batches: Iterable[Batch],
    num_examples: int,
    mesh: Mesh,
    title: str,
) -> tuple[Int32[np.ndarray, " N"], Detections]:
    """(example, detections) of every example in `batches` as NumPy arrays, in ascending order of example.

    batches: this process's part of each global batch; images with example -1 only fill up a batch and are left out.
    """
    rows = []

    def keep(example, detections):
        example, detections = jax.device_get((example, detections))
        real = example >= 0
        rows.append((example[real], Detections(*(x[real] for x in detections))))
        progress.update(int(real.sum()))

    with tqdm(
        total=num_examples, desc=title, unit=" images", disable=True if jax.process_index() else None
    ) as progress:
        pending = None
        for batch in batches:
            running = detect_step(arrays, shard_batch(batch, mesh))
            if pending is not None:
                keep(*pending)  # while the devices are busy with the next batch
            pending = running
        if pending is not None:
            keep(*pending)
    example = np.concatenate([row[0] for row in rows])
    order = np.argsort(example)
    columns = zip(*(row[1] for row in rows), strict=True)
    return example[order], Detections(*(np.concatenate(column)[order] for column in columns))


def evaluate(
    detect_step: DetectStep, arrays: dict[str, Array], source, config: ConfigDict, mesh: Mesh
) -> tuple[dict, list[dict]]:
    """(metrics, results) of a whole split: what `coco_metric` tells, and COCO's results format, which it tells it of.

    arrays: what `detect_step` was made for. A split without annotations has no metrics. Where config.eval asks for
    views of the images, their detections are merged. Raises UserError for answers that are not finite.
    """
    views = evaluation_views(source, config)
    detections = detect_split(detect_step, arrays, source, config, mesh, views)
    if views is not None:
        limits = dict(max_detections=config.eval.max_detections, iou=config.eval.merge_iou)
        detections = merge_views(views, detections, **limits)
    return count_detections(detections, source, config)


def evaluation_views(source, config: ConfigDict) -> Views | None:
    """What is detected in place of the images; None where it is they."""
    return plan_views(source.sizes, config.data, config.eval) if has_several(config.eval) else None


def evaluation_batches(source, config: ConfigDict, mesh: Mesh, views: Views | None) -> EvaluationBatches:
    """This process's part of them: config.eval.batch_size images, and as many more as fill up the devices."""
    return EvaluationBatches(
        source,
        config.data,
        batch_size=whole_batch(config.eval.batch_size, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        views=views,
    )


def detect_split(
    detect_step: DetectStep,
    arrays: dict[str, Array],
    source,
    config: ConfigDict,
    mesh: Mesh,
    views: Views | None = None,
):
    """What `detect_step` answers to every image of a split, or to views of them, NumPy arrays in their order.

    Every process calls this with the same arguments and gets the same answer: each runs its slice of every batch.
    Raises UserError for answers that are not finite.
    """
    batches = evaluation_batches(source, config, mesh, views)
    count = len(source) if views is None else len(views.example)
    example, detections = detect(detect_step, arrays, batches, count, mesh, "Evaluating")
    if not np.array_equal(example, np.arange(count)):
        raise RuntimeError(f"Evaluation saw {len(example)} of {count} images, or some of them twice.")
    if not all(np.isfinite(x).all() for x in (detections.scores, detections.boxes)):
        raise UserError("The detector's answers are not finite numbers: its parameters are broken.")
    return detections


def count_detections(detections: Detections, source, config: ConfigDict) -> tuple[dict, list[dict]]:
    """(metrics, results) of NumPy detections that `source` has in its order: what `evaluate` returns."""
    with _no_collection():
        results = coco_results(detections, source.image_ids, source.classes, config.eval.score_threshold)
        if not source.annotated:
            return {}, results
        metrics = coco_metric(
            ground_truth(source),
            results,
            max_detections=config.eval.max_detections_per_class,
            area_scale=source.area_scale,
        )
    return metrics, results


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which takes longer than the metric where half a million results are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_results(directory: Path, metrics: dict, results: list[dict], data: Mapping | None = None) -> None:
    """Writes detections.json, of `data` (a fingerprint of what was evaluated) data.json, and then, if there are any,
    metrics.json; each appears whole or not. Raises UserError.

    A report of what was there before is removed.
    """
    # As quick as the metric, which json is not.
    texts: dict[str, str | bytes] = {"detections.json": orjson.dumps(results, option=orjson.OPT_APPEND_NEWLINE)}
    if data is not None:
        texts[DATA] = json.dumps(data) + "\n"
    if metrics:
        texts["metrics.json"] = json.dumps(metrics, allow_nan=False) + "\n"
    try:
        make_folder(directory)
        (directory / "report.html").unlink(missing_ok=True)
        for name, text in texts.items():
            write_whole(directory / name, text)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {reason(error)}.") from error

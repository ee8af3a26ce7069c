"""The evaluation loop over a real COCO directory, with a detector that sees where the bright pixels are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step, write_results
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Predictions


def find_rectangle(arrays):
    """A detector with two queries: the box around the bright pixels, white or green, and no object at all. Its only
    parameter scales the box."""

    def detector(image, pixel_valid):
        bright = (image[..., 1] > 0.2) & pixel_valid
        white = (image[..., 0] > 0.2).sum((1, 2)) > 0
        edges = []
        for axis in (2, 1):  # along columns, then rows
            line = bright.any(3 - axis)
            valid = pixel_valid.any(3 - axis).sum(-1)
            first, last = line.argmax(-1), line.shape[-1] - line[:, ::-1].argmax(-1)
            edges.append((first / valid, last / valid))
        (left, right), (top, bottom) = edges
        box = jnp.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1) * arrays["scale"]
        found = bright.any((1, 2))
        classes = jnp.stack([white, ~white, jnp.zeros_like(white)], -1) & found[:, None]
        logits = jnp.stack([jnp.where(classes, 5.0, -5.0), jnp.full(classes.shape, -5.0).at[:, 2].set(5.0)], 1)
        boxes = jnp.stack([box, jnp.full_like(box, 0.5)], 1)
        return Predictions(logits[None], boxes[None])

    return detector


def configuration(rectangles, **fields):
    config = base()
    config.model = {"num_classes": 2}
    config.data.update(rectangles)
    config.eval.update(fields)
    return config


@pytest.mark.parametrize("devices, batch_size", [(1, 4), (8, 8), (8, 6)])
def test_finds_every_rectangle(rectangles, devices, batch_size):
    """Whatever the bucket, the padding, the device, and whether a batch divides over them: AP50 is 1.

    Boxes come back in pixels of the stored image.
    """
    config = configuration(rectangles, batch_size=batch_size)
    source = open_source(config.data, "validation")
    mesh = make_mesh(devices=jax.devices()[:devices])
    step = make_detect_step(find_rectangle, config, mesh)
    metrics, results = evaluate(step, {"scale": jnp.ones(())}, source, config, mesh)
    assert metrics["AP50"] == metrics["AP75"] == 1.0 and metrics["AP"] > 0.9
    assert len(results) == 20 and sorted({r["image_id"] for r in results}) == list(range(891, 901))
    best = {r["image_id"]: r for r in results if r["score"] > 0.9}
    assert 891 not in best and len(best) == 9
    for i in range(len(source)):
        truth = source.annotations(i)
        if len(truth.boxes):
            found = best[int(source.image_ids[i])]
            assert found["category_id"] == truth.category_id[0]
            np.testing.assert_allclose(found["bbox"], truth.boxes[0], atol=1.01 * max(source.sizes[i]) / 96)

    wrong, _ = evaluate(step, {"scale": jnp.full((), 0.5)}, source, config, mesh)  # the same compiled step
    assert wrong["AP50"] < 0.2


def test_settings_of_config_and_data_set(rectangles):
    config = configuration(rectangles, score_threshold=0.5, max_detections=1)
    mesh = make_mesh()
    source = open_source(config.data, "validation")
    step = make_detect_step(find_rectangle, config, mesh)
    metrics, results = evaluate(step, {"scale": jnp.ones(())}, source, config, mesh)
    assert len(results) == 9 and metrics["AP50"] == 1.0
    assert metrics["APs"] > 0.8 and metrics["APl"] == -1.0  # rectangles of at most 45 x 40 pixels
    source.area_scale = 1 / 64
    metrics, _ = evaluate(step, {"scale": jnp.ones(())}, source, config, mesh)
    assert metrics["APs"] == -1.0 and metrics["APl"] > 0.8


def test_answers_that_are_not_finite_are_refused(rectangles):
    config = configuration(rectangles)
    mesh = make_mesh()
    step = make_detect_step(find_rectangle, config, mesh)
    with pytest.raises(UserError, match="not finite"):
        evaluate(step, {"scale": jnp.full((), jnp.nan)}, open_source(config.data, "validation"), config, mesh)


def test_settings_that_do_not_fit(rectangles):
    with pytest.raises(UserError, match="config.eval.batch_size is 0"):
        make_detect_step(find_rectangle, configuration(rectangles, batch_size=0), make_mesh())
    with pytest.raises(UserError, match="config.eval.max_detections is 0"):
        make_detect_step(find_rectangle, configuration(rectangles, max_detections=0), make_mesh())


def test_results_are_written_whole_or_not_at_all(tmp_path):
    results = [{"image_id": 3, "category_id": 1, "bbox": [0.1, 2.0, 3.0, 4.0], "score": 0.25}]
    write_results(tmp_path / "eval" / "7", {"AP": 0.5}, results)
    write_results(tmp_path / "eval" / "7", {"AP": 0.75}, results)  # the second takes the place of the first
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path / "eval" / "7", {"AP": float("nan")}, results)
    assert json.loads((tmp_path / "eval" / "7" / "metrics.json").read_text()) == {"AP": 0.75}
    assert json.loads((tmp_path / "eval" / "7" / "detections.json").read_text()) == results

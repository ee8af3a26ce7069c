"""Evaluation over two hosts, each loading half of every batch, against the same evaluation in one process."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Predictions
from tests.processes import Forked, free_address

pytestmark = pytest.mark.slow


def program(process: int, count: int, address: str, data: dict, rows: Path) -> int:
    """What each process does, of two devices."""
    if count > 1:
        jax.distributed.initialize(address, count, process)
    config = base()
    config.model = {"num_classes": 2}
    config.data.update(data)
    config.eval.batch_size = 4
    source, mesh = open_source(config.data, "validation"), make_mesh()
    assert mesh.size == 2 * count
    step = make_detect_step(mean_color, config, mesh)
    Path(f"{rows}.{process}").write_text(json.dumps(evaluate(step, {"scale": jnp.ones(())}, source, config, mesh)))
    return 0


def mean_color(arrays):
    def detector(image, pixel_valid):
        color = image.mean((1, 2))[:, None] / pixel_valid.mean((1, 2))[:, None, None] * arrays["scale"]
        boxes = jax.nn.sigmoid(jnp.concatenate([color, color[..., :1]], -1))
        return Predictions(color[None], boxes[None])

    return detector


def _rows(metrics: dict) -> list[dict]:
    """Its numbers, then the rows of its tables."""
    tables = [name for name, value in metrics.items() if isinstance(value, list)]
    return [{name: value for name, value in metrics.items() if name not in tables}, *sum(map(metrics.get, tables), [])]


def test_two_processes_give_the_answer_of_one(rectangles, tmp_path):
    open_source(rectangles, "validation")  # prepared before two processes need it
    data, address = rectangles.to_dict(), free_address()
    runs = [Forked(program, 0, 1, address, data, tmp_path / "alone", devices=2)]
    runs += [Forked(program, index, 2, address, data, tmp_path / "pair", devices=2) for index in range(2)]
    for run in runs:
        status, _, errors = run.end()
        assert status == 0, errors
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in ("alone.0", "pair.0", "pair.1"))
    assert first == second
    for here, there in zip(_rows(first[0]), _rows(alone[0]), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert len(first[1]) == len(alone[1]) == 10
    for here, there in zip(first[1], alone[1], strict=True):
        assert here["image_id"] == there["image_id"] and here["bbox"] == pytest.approx(there["bbox"], rel=1e-5)

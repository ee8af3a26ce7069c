"""Evaluation over two hosts, each loading half of every batch, against the same evaluation in this process."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Predictions
from tests.processes import Forked, free_address

pytestmark = pytest.mark.slow


def program(process: int, address: str, data: dict, output: Path) -> int:
    """What each host does, with two devices."""
    jax.distributed.initialize(address, 2, process)
    assert jax.device_count() == 4
    output.write_text(json.dumps(evaluated(data, jax.devices())))
    return 0


def evaluated(data, devices):
    """(metrics, results) of these devices, which all hosts have together."""
    config = base()
    config.model = {"num_classes": 2}
    config.data.update(data)
    config.eval.batch_size = 4
    source, mesh = open_source(config.data, "validation"), make_mesh(devices=devices)
    step = make_detect_step(mean_color, config, mesh)
    return evaluate(step, {"scale": np.ones((), np.float32)}, source, config, mesh)


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
    alone = evaluated(rectangles, jax.devices()[:2])  # the data are prepared before two processes need them
    address, outputs = free_address(), [tmp_path / "first.json", tmp_path / "second.json"]
    hosts = [Forked(program, i, address, rectangles.to_dict(), outputs[i], devices=2) for i in range(2)]
    for status, _, errors in [host.end() for host in hosts]:
        assert status == 0, errors
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first == second
    for here, there in zip(_rows(first[0]), _rows(alone[0]), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert len(first[1]) == len(alone[1]) == 10
    for here, there in zip(first[1], alone[1], strict=True):
        assert here["image_id"] == there["image_id"] and here["bbox"] == pytest.approx(there["bbox"], rel=1e-5)

"""Evaluation over two hosts, each loading half of every batch, against the same evaluation in this process."""

import json
import os
import pickle
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Predictions
from tests.quick_compile import quick_flags

pytestmark = pytest.mark.slow

PROGRAM = """
import json, pickle, sys
import jax

process, address, data, output = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, process)
assert jax.device_count() == 4
from tests.evaluation.test_two_processes import evaluated

json.dump(evaluated(pickle.load(open(data, "rb")), jax.devices()), open(output, "w"))
"""


def mean_color(arrays):
    def detector(image, pixel_valid):
        color = image.mean((1, 2))[:, None] / pixel_valid.mean((1, 2))[:, None, None] * arrays["scale"]
        boxes = jax.nn.sigmoid(jnp.concatenate([color, color[..., :1]], -1))
        return Predictions(color[None], boxes[None])

    return detector


def evaluated(data, devices):
    """[metrics, results] of these devices, which all hosts have together."""
    config = base()
    config.model = {"num_classes": 2}
    config.data.update(data)
    config.eval.batch_size = 4
    source, mesh = open_source(config.data, "validation"), make_mesh(devices=devices)
    step = make_detect_step(mean_color, config, mesh)
    return evaluate(step, {"scale": np.ones((), np.float32)}, source, config, mesh)


def start(process, address, data, output, root):
    """One process with two devices."""
    environment = os.environ | {"XLA_FLAGS": quick_flags(2), "PYTHONPATH": str(root)}
    arguments = [str(argument) for argument in (process, address, data, output)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def _rows(metrics: dict) -> list[dict]:
    """Its numbers, then the rows of its tables."""
    tables = [name for name, value in metrics.items() if isinstance(value, list)]
    return [{name: value for name, value in metrics.items() if name not in tables}, *sum(map(metrics.get, tables), [])]


def test_two_processes_give_the_answer_of_one(rectangles, tmp_path, request):
    alone = evaluated(rectangles, jax.devices()[:2])  # the data are prepared before two processes need them
    (tmp_path / "data").write_bytes(pickle.dumps(rectangles.to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    outputs = [tmp_path / "first.json", tmp_path / "second.json"]
    runs = [start(i, address, tmp_path / "data", outputs[i], request.config.rootpath) for i in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first == second
    for here, there in zip(_rows(first[0]), _rows(alone[0]), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert len(first[1]) == len(alone[1]) == 10
    for here, there in zip(first[1], alone[1], strict=True):
        assert here["image_id"] == there["image_id"] and here["bbox"] == pytest.approx(there["bbox"], rel=1e-5)

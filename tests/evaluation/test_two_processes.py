"""Evaluation over two hosts, each loading half of every batch, against the same evaluation in one process."""

import json
import os
import pickle
import socket
import subprocess
import sys

import pytest

from deperceiver_jax.data import open_source

pytestmark = pytest.mark.slow

PROGRAM = """
import json, pickle, sys
import jax
import jax.numpy as jnp

process, count, address, data, rows = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
if count > 1:
    jax.distributed.initialize(address, count, process)
from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.evaluate import evaluate, make_detect_step
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Predictions

def mean_color(arrays):
    def detector(image, pixel_valid):
        color = image.mean((1, 2))[:, None] / pixel_valid.mean((1, 2))[:, None, None] * arrays["scale"]
        boxes = jax.nn.sigmoid(jnp.concatenate([color, color[..., :1]], -1))
        return Predictions(color[None], boxes[None])
    return detector

config = base()
config.model = {"num_classes": 2}
config.data.update(pickle.load(open(data, "rb")))
config.eval.batch_size = 4
source, mesh = open_source(config.data, "validation"), make_mesh()
assert mesh.size == 2 * count
step = make_detect_step(mean_color, config, mesh)
metrics, results = evaluate(step, {"scale": jnp.ones(())}, source, config, mesh)
json.dump([metrics, results], open(f"{rows}.{process}", "w"))
"""


def start(process, count, address, data, output, root):
    """One process with two devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(root)}
    arguments = [str(argument) for argument in (process, count, address, data, output)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def _rows(metrics: dict) -> list[dict]:
    """Its numbers, then the rows of its tables."""
    tables = [name for name, value in metrics.items() if isinstance(value, list)]
    return [{name: value for name, value in metrics.items() if name not in tables}, *sum(map(metrics.get, tables), [])]


def test_two_processes_give_the_answer_of_one(rectangles, tmp_path, request):
    open_source(rectangles, "validation")  # prepared before two processes need it
    (tmp_path / "data").write_bytes(pickle.dumps(rectangles.to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = request.config.rootpath
    runs = [start(0, 1, address, tmp_path / "data", tmp_path / "alone", root)]
    runs += [start(i, 2, address, tmp_path / "data", tmp_path / "pair", root) for i in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in ("alone.0", "pair.0", "pair.1"))
    assert first == second
    for here, there in zip(_rows(first[0]), _rows(alone[0]), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert len(first[1]) == len(alone[1]) == 10
    for here, there in zip(first[1], alone[1], strict=True):
        assert here["image_id"] == there["image_id"] and here["bbox"] == pytest.approx(there["bbox"], rel=1e-5)

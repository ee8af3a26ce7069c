"""The browser of the report's tests, and runs to compare."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import SUMMARY, coco_metric, ground_truth
from deperceiver_jax.evaluation.evaluate import write_results
from deperceiver_jax.runs.workdir import write_workdir
from tests.report.conftest import browser, some_results  # noqa: F401


@pytest.fixture
def make_run(rectangles, tmp_path):
    """make_run(name, near, seed=0): a workdir with an evaluation whose detections lie near pixels off, and its log."""
    source = open_source(rectangles, "validation")

    def make(name, near, seed=0, **model):
        config = base()
        config.model = ConfigDict({"num_classes": 2, "name": "detr", **model})
        config.data.update(rectangles)
        config.seed = seed
        write_workdir(tmp_path / name, config, source.classes)
        results = some_results(source)
        rng = np.random.default_rng(seed)
        for row in results:
            row["bbox"] = (np.array(row["bbox"]) + near * rng.uniform(-1, 1, 4)).tolist()
        metrics = coco_metric(ground_truth(source), results)
        write_results(tmp_path / name / "eval" / "40", metrics, results)
        lines = []
        for step in (10, 20, 30, 40):
            speed = {"images_per_second": 8, "host_memory_gib": 2 - 1 / step}
            lines.append({"step": step, "split": "train", "epoch": step / 10, "loss": 50 / step, **speed})
            scores = {key: metrics[key] * step / 40 if metrics[key] >= 0 else -1.0 for key in SUMMARY}
            lines.append({"step": step, "split": "validation", "epoch": step / 10, **scores})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name, metrics

    return make

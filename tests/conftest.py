"""Eight simulated devices, no silent rank promotion: set before JAX starts."""

import gc
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and the command-line programs live beside the package

from tests.quick_compile import quick_flags  # noqa: E402

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick_flags(8)}"
# XLA runs all simulated devices on one pool of as many threads as there are cores, and stops for ever when a queue of
# steps takes them all while a collective waits for its last participant. More threads than that queue needs:
os.environ.setdefault("NPROC", "32")

# No test reaches the network: nothing is fetched by name but from a hub on this machine.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}

import cv2  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests import durations  # noqa: E402
from tests.drawn_arrays import draw_arrays  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes objects by the million, and hardly any garbage: a sixth of the time went into looking for it.
gc.freeze()
gc.set_threshold(100_000, 50, 100)


def pytest_xdist_auto_num_workers():
    """One more than there are processors: workers wait for the processes and servers that they start."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


recorder = durations.Recorder()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that were found to take long are slow as those are that say so; files that take longest come first."""
    long = durations.read()
    for item in items:
        if item.nodeid in long:
            item.add_marker("slow")
    durations.order(items, [item for item in items if item.get_closest_marker("slow")])


def pytest_runtest_logreport(report):
    recorder.add(report)


def pytest_sessionfinish():
    recorder.write()


@pytest.fixture(autouse=True)
def pycocotools_agrees(monkeypatch):
    """Whatever a test evaluates in this process is counted by pycocotools, too."""
    from deperceiver_jax.evaluation import evaluate
    from tests.evaluation.coco_oracle import assert_same, reference

    count = evaluate.coco_metric

    def count_twice(truth, results, **options):
        metrics = count(truth, results, **options)
        assert_same(metrics, reference(truth, results, **options))
        return metrics

    monkeypatch.setattr(evaluate, "coco_metric", count_twice)


RECTANGLE_SIZES = [(60, 80), (80, 60), (33, 47), (64, 64), (50, 200), (120, 90), (40, 40), (61, 83), (90, 45)]


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory):
    """config.data of a COCO directory of ten images: a white or a green rectangle on black, and one without any."""
    from configs.base import base

    root = tmp_path_factory.mktemp("rectangles")
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (height, width) in enumerate([*RECTANGLE_SIZES, (50, 50)]):
        image = np.zeros((height, width, 3), np.uint8)
        images.append({"id": 900 - i, "file_name": f"{i}.png", "height": height, "width": width})
        if i < len(RECTANGLE_SIZES):
            x, y = (int(rng.integers(2, side // 3)) for side in (width, height))
            w, h = (int(rng.integers(side // 3, side // 2)) for side in (width, height))
            category = (20, 30)[i % 2]
            image[y : y + h, x : x + w] = (255, 255, 255) if category == 20 else (0, 255, 0)
            entry = {"id": i, "image_id": 900 - i, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append(entry | {"area": w * h, "iscrowd": 0})
        (root / "val2017" / f"{i}.png").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    categories = [{"id": 20, "name": "white"}, {"id": 30, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = base().data
    data.directory, data.prepared_directory = str(root), str(root / "prepared")
    data.eval_scale, data.eval_max_size, data.num_workers = 96, 160, 0
    return data


@pytest.fixture(scope="session")
def random_arrays():
    """`draw_arrays`, for the arrays by path that `take_apart` gives of an abstract detector."""
    return draw_arrays


@pytest.fixture(scope="session")
def tiny_run(rectangles, tmp_path_factory):
    """A workdir as training leaves it: a tiny DePerceiver with random parameters at step 3, the best, and step 7.

    Step 7 has a moving average that differs from its parameters.
    """
    from configs.deperceiver import get_config
    from deperceiver_jax.data import open_source
    from deperceiver_jax.runs.workdir import write_workdir
    from deperceiver_jax.sharding import make_mesh
    from deperceiver_jax.training.build import build_training
    from deperceiver_jax.training.checkpoint import Checkpoints

    config = get_config("r50_16")
    config.data.update(rectangles)
    model = config.model
    model.backbone.update(depth=18, width=8, frozen_stages=0)
    model.update(embed_dim=32, num_queries=5, num_classes=2)
    model.encoder.update(num_latents=8, latent_dim=32, num_blocks=1, layers_per_block=1, self_heads=2)
    config.optimizer.ema_decay = 0.5
    workdir = tmp_path_factory.mktemp("tiny_run")
    config.data.eval_buckets = 1
    config.train.compilation_cache = str(workdir / "compiled")
    write_workdir(workdir, config, open_source(config.data, "validation").classes)

    plan = build_training(config, make_mesh(devices=jax.devices()[:1]), steps_per_epoch=10, num_steps=10).plan
    checkpoints = Checkpoints(workdir, keep=2)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.abstract)
    state = state._replace(params=draw_arrays(state.params), frozen=draw_arrays(state.frozen))
    for step in (3, 7):
        ema = {path: x * 1.5 if step == 7 else x for path, x in state.params.items()}
        checkpoints.save(state._replace(step=np.full((), step, np.int32), ema=ema), {})
    checkpoints.close()
    scores = [{"step": 3, "split": "validation", "AP": 0.25}, {"step": 7, "split": "validation", "AP": 0.125}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    return workdir


@pytest.fixture(scope="session")
def bucket_server():
    """A bucket on loopback, where libraries of this process find it."""
    from tests.bucket import serve_bucket

    with serve_bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.variables.items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket(bucket_server):
    """The same, with nothing wrong with it at first."""
    yield bucket_server
    bucket_server.mend()

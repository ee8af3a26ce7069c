"""Real trackers without a network: W&B's offline mode, MLflow's and Trackio's files have what metrics.jsonl has.

Their packages take seconds to import, and are by the tests that ask them alone.
"""

import importlib.util
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import demo
from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.workdir import flat_fields
from deperceiver_jax.training.metric_log import MetricLog
from deperceiver_jax.training.trackers import check_trackers

pytestmark = pytest.mark.slow
PICTURE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # so that it is as before afterwards
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", MLFLOW_DISABLE_TELEMETRY="true").items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def log_of(workdir, *trackers, steps=range(1, 5)):
    config = demo.get_config("detr")
    config.train.update(trackers=trackers, log_every=2)
    workdir.mkdir(exist_ok=True)
    log = MetricLog(workdir, config, steps=steps, steps_per_epoch=2, writes=True)
    for step in steps:
        log.training(step, {"loss": 7.0 / step, "lr": 1e-3 / step})
    log.evaluation("validation", {"AP": 0.1 * step, "APs": -1.0})
    log.images("validation", {"a.jpg": PICTURE, "ü b.jpg": PICTURE})
    log.close()
    return config


def numbers_of(workdir):
    """{(name, step): value} of metrics.jsonl."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    head = ("step", "split", "epoch")
    return {(f"{row['split']}/{k}", row["step"]): v for row in rows for k, v in row.items() if k not in head}


def wandb_records(file: Path):
    """The records of an offline run: blocks of 32 kB with chunks (checksum, length, kind), of which some make one."""
    from wandb.proto import wandb_internal_pb2

    content, record, position = file.read_bytes(), b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):  # it is being written
            return
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def runs_of(workdir: Path):
    """The records of each of its offline runs, when W&B's own process has written the last one."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        runs = [list(wandb_records(file)) for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb"))]
        if all(records and records[-1].HasField("exit") for records in runs):
            return runs
        time.sleep(0.1)
    raise AssertionError(f"{workdir} has a run of W&B that does not end")


def test_wandb(tmp_path):
    config = log_of(tmp_path / "run", "wandb")
    time.sleep(1.1)  # W&B's folders are named by the second
    log_of(tmp_path / "run", "wandb", steps=range(5, 7))  # continued
    numbers, ids = {}, set()
    for records in runs_of(tmp_path / "run"):
        for record in records:
            if record.HasField("history"):
                items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                numbers |= {(name, items["_step"]): x for name, x in items.items() if not name.startswith("_")}
            elif record.HasField("run"):
                ids.add(record.run.run_id)
                settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert settings["data"]["batch_size"] == config.data.batch_size
    pictures = {key: numbers.pop(key) for key in list(numbers) if key[0].startswith("validation/images/")}
    assert numbers == numbers_of(tmp_path / "run") and len(numbers) > 10 and len(ids) == 1
    assert [pictures["validation/images/captions", step] for step in (4, 6)] == [["a.jpg", "ü b.jpg"]] * 2
    saved = next((tmp_path / "run").rglob("validation/images_4_*.png"))
    assert np.array_equal(np.asarray(Image.open(saved)), PICTURE)


def test_mlflow(tmp_path):
    import mlflow

    config = log_of(tmp_path / "run", "mlflow")
    log_of(tmp_path / "run", "mlflow", steps=range(5, 7))
    client = mlflow.MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("deperceiver_jax").experiment_id])
    history = [metric for name in run.data.metrics for metric in client.get_metric_history(run.info.run_id, name)]
    numbers = {(metric.key, metric.step): metric.value for metric in history}
    assert numbers == numbers_of(tmp_path / "run") and len(history) == len(numbers) > 10
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {name: str(value) for name, value in flat_fields(config).items()}
    assert json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.json"))["train"]["log_every"] == 2
    assert len(list((tmp_path / "run" / "mlruns").rglob("artifacts/validation/images/*/*.png"))) == 4


def test_trackio(tmp_path, monkeypatch):
    """Its folder is read when it is imported, which this test alone does."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("Trackio is not installed: pip install '.[trackio]', which brings a Pillow below 13.")
    assert "trackio" not in sys.modules
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = log_of(tmp_path / "run", "trackio")
    log_of(tmp_path / "run", "trackio", steps=range(5, 7))
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("deperceiver_jax")
    rows = SQLiteStorage.get_logs("deperceiver_jax", name)
    numbers = {(key, row["step"]): x for row in rows for key, x in row.items() if key not in ("step", "timestamp")}
    pictures = {key: numbers.pop(key) for key in list(numbers) if key[0].startswith("validation/images/")}
    assert numbers == numbers_of(tmp_path / "run") and len(numbers) > 10 and name.startswith("run-")
    assert [pictures[f"validation/images/{k}", 4]["caption"] for k in (0, 1)] == ["a.jpg", "ü b.jpg"]
    saved = tmp_path / "trackio" / "media" / pictures["validation/images/0", 4]["file_path"]
    assert np.array_equal(Image.open(saved).convert("RGB"), PICTURE) and len(pictures) == 4
    stored = SQLiteStorage.get_run_config("deperceiver_jax", name)
    assert stored["data.batch_size"] == config.data.batch_size


@pytest.mark.parametrize("what", ["start", "log", "finish"])
def test_a_tracker_that_fails_never_ends_a_run(tmp_path, monkeypatch, capsys, what):
    """The other one still has everything."""

    def fail(*arguments, **fields):
        raise OSError("the server is gone\nand more")

    if what == "start":
        monkeypatch.setattr("wandb.init", fail)
    else:
        monkeypatch.setattr(f"wandb.sdk.wandb_run.Run.{what}", fail)
    log_of(tmp_path / "run", "wandb", "mlflow")
    sentence = "warning: wandb is left out from here on, and the run goes on: the server is gone.\n"
    assert capsys.readouterr().err.count(sentence) == 1
    assert len(numbers_of(tmp_path / "run")) > 5 and list((tmp_path / "run").rglob("mlruns/*/*/metrics/validation/AP"))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("tensorboard",), "config.train.trackers is 'tensorboard'; it can be wandb, mlflow or trackio."),
        (("mlflow", "wandb"), "config.train.trackers has wandb, which is not installed: pip install '.[wandb]'."),
    ],
)
def test_unknown_and_missing_trackers(monkeypatch, names, sentence, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else sys)
    with pytest.raises(UserError) as refused:
        check_trackers(names, tmp_path)
    assert str(refused.value) == sentence

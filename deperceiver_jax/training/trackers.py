"""Experiment trackers beside metrics.jsonl, which get its numbers, the config and a few images.

Each is an extra (`pip install '.[wandb]'`) and is set up as its own documentation says, by its environment variables.
A tracker only watches: one that fails is left out with a warning, and the run goes on.
"""

import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from deperceiver_jax.errors import UserError, check_choice
from deperceiver_jax.files import is_bucket, write_whole
from deperceiver_jax.runs.workdir import config_text, flat_fields

PROJECT = "deperceiver_jax"  # or experiment, where no environment variable names another
IDS = "trackers.json"  # in the workdir: by which a run is known again when it is continued
MOST_PARAMS = 100  # that MLflow takes at a time

Images = Mapping[str, UInt8[np.ndarray, "H W 3"]]


class Tracker(Protocol):
    """One run in one tracker; `id` is the tracker's name for it."""

    id: str

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def images(self, step: int, title: str, images: Images) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. WANDB_MODE=offline writes into the workdir, for `wandb sync`."""

    def __init__(self, name: str, folder: Path, config: ConfigDict, known: str | None):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=folder,
            id=known,
            resume="allow" if known else None,
            config=config.to_dict(),
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )
        self.id = self.run.id

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def images(self, step: int, title: str, images: Images) -> None:
        self.run.log({title: [self.wandb.Image(image, caption=name) for name, image in images.items()]}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, in MLFLOW_TRACKING_URI, or else in files in the workdir: mlflow ui --backend-store-uri=WORKDIR/mlruns."""

    def __init__(self, name: str, folder: Path, config: ConfigDict, known: str | None):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            address = (folder / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # or else it wants a database
        self.client = MlflowClient(address)
        self.id = known or self._new_run(name)
        if not known:
            params = [Param(name, str(value)) for name, value in flat_fields(config).items()]
            for first in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.id, params=params[first : first + MOST_PARAMS])
        self.client.log_text(self.id, config_text(config), "config.json")

    def _new_run(self, name: str) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self.client.create_experiment(title)
        return self.client.create_run(number, run_name=name).info.run_id

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.metric(name, x, now, step) for name, x in metrics.items()])

    def images(self, step: int, title: str, images: Images) -> None:
        for number, image in enumerate(images.values()):
            self.client.log_image(self.id, Image.fromarray(image), artifact_file=f"{title}/{step}/{number}.png")

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """Trackio, in TRACKIO_DIR, or on the server or Space that its variables name; `trackio show` shows it."""

    def __init__(self, name: str, folder: Path, config: ConfigDict, known: str | None):
        import trackio

        self.trackio = trackio
        self.id = known or f"{name}-{secrets.token_hex(3)}"  # Trackio finds a run by its name
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=flat_fields(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def images(self, step: int, title: str, images: Images) -> None:
        named = [self.trackio.Image(image, caption=name) for name, image in images.items()]
        self.run.log({f"{title}/{number}": image for number, image in enumerate(named)}, step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: Mapping[str, type[Any]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def check_trackers(names: Sequence[str], workdir: Path) -> None:
    """Raises UserError for a tracker that there is not, that is not installed, or whose files no bucket can take.

    `names` is config.train.trackers.
    """
    for name in names:
        check_choice("config.train.trackers", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.train.trackers has {name}, which is not installed: pip install '.[{name}]'.")
    if "mlflow" in names and is_bucket(workdir) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("config.train.trackers: mlflow's own files cannot be in a bucket: set MLFLOW_TRACKING_URI.")


class Trackers:
    """Those of a run, which is known again by `workdir` when it is continued. Their own files go to `folder`."""

    def __init__(self, names: Sequence[str], workdir: Path, config: ConfigDict, folder: Path):
        self.active: dict[str, Tracker] = {}
        file = workdir / IDS
        ids = json.loads(file.read_text()) if file.exists() else {}
        called = workdir.name if is_bucket(workdir) else workdir.absolute().name
        for name in names:
            try:
                self.active[name] = TRACKERS[name](called, folder, config, ids.get(name))
            except Exception as error:
                self._leave_out(name, error)
        if self.active:
            write_whole(file, json.dumps(ids | {name: tracker.id for name, tracker in self.active.items()}) + "\n")

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a line of metrics.jsonl, as "split/name"."""
        self._all("numbers", step, metrics)

    def images(self, step: int, title: str, images: Images) -> None:
        """A few pictures by name."""
        self._all("images", step, title, images)

    def close(self) -> None:
        self._all("close")

    def _all(self, what: str, *arguments) -> None:
        for name, tracker in list(self.active.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:  # whatever it may be, the run is worth more
                del self.active[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        why = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        print(f"warning: {name} is left out from here on, and the run goes on: {why}.", file=sys.stderr, flush=True)

"""What a run tells: metrics.jsonl, TensorBoard event files and a progress bar, all from process 0 alone.

A line of metrics.jsonl is one JSON object:

    {"step": 500, "split": "train", "epoch": 2.5, "loss": .., "loss_ce": .., "lr": .., "images_per_second": ..}
    {"step": 500, "split": "validation", "epoch": 2.5, "AP": .., "AP50": ..}

Training lines are means over the steps since the line before; `lr` is the last step's. `step` counts finished steps.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from deperceiver_jax.errors import UserError
from deperceiver_jax.training.workdir import METRICS

SHOWN = ("loss_ce", "loss_focal", "loss_bbox", "loss_giou")  # beside the total: the answer's own terms


class MetricLog:
    """The log of one run from `start_step` on. `progress` is what a checkpoint keeps of it."""

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        num_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        log_every: int,
        writes: bool,
        progress: dict | None = None,
    ):
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.log_every = log_every
        self.writes = writes
        self.window = progress["window"] if progress else {"count": 0, "sums": {}}
        self.step = start_step
        self.bar = None
        if writes:
            forget_after(workdir / METRICS, start_step)
            self.file = open(workdir / METRICS, "a")
            self.tensorboard = SummaryWriter(str(workdir), purge_step=start_step + 1)
        self.start_clock()

    def start_clock(self) -> None:
        """Starts, or starts again, to measure speed: from here to the next line, without what went before."""
        self.clock, self.clock_step = time.perf_counter(), self.step
        if self.writes and self.bar is None and sys.stderr.isatty():
            self.bar = tqdm(initial=self.step, total=self.num_steps, dynamic_ncols=True, leave=False)

    def stop_clock(self) -> None:
        """Takes the bar away, for an evaluation that shows its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes a finished step; writes a line after every log_every steps and after the last."""
        self.step = step
        self.window["count"] += 1
        sums = self.window["sums"]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
        if self.bar is not None:
            self.bar.bar_format = (
                f"{{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {self._text(metrics, brief=True)}"
            )
            self.bar.update(1)
        if step % self.log_every == 0 or step == self.num_steps:
            means = {name: value / self.window["count"] for name, value in sums.items()}
            means |= {"lr": metrics["lr"], "images_per_second": self._images_per_second()}
            self._write("train", means)
            if self.writes and self.bar is None:
                print(f"step {step}/{self.num_steps}  {self._text(means, brief=False)}", flush=True)
            self.window = {"count": 0, "sums": {}}
            self.clock, self.clock_step = time.perf_counter(), step

    def evaluation(self, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of the state after the current step on a split of the data."""
        self._write(split, metrics)

    def progress(self) -> dict:
        """What the next line needs of the steps before it, for a run that continues from here."""
        return {"window": self.window}

    def close(self) -> None:
        self.stop_clock()
        if self.writes:
            self.file.close()
            self.tensorboard.close()

    def _images_per_second(self) -> float:
        return (self.step - self.clock_step) * self.batch_size / max(time.perf_counter() - self.clock, 1e-9)

    def _text(self, metrics: Mapping[str, float], *, brief: bool) -> str:
        names = ["loss", *(name for name in SHOWN if name in metrics)]
        values = " ".join(f"{name.removeprefix('loss_')} {metrics[name]:.4g}" for name in names)
        if brief:
            return f"[{{elapsed}}<{{remaining}}, {self._images_per_second():.3g} images/s] {values}"
        return f"{values}  lr {metrics['lr']:.3g}  {metrics['images_per_second']:.3g} images/s"

    def _write(self, split: str, metrics: Mapping[str, float]) -> None:
        if not self.writes:
            return
        head = {"step": self.step, "split": split, "epoch": round(self.step / self.steps_per_epoch, 4)}
        self.file.write(json.dumps({**head, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(f"{split}/{name}", value, self.step)


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that was cut off, so that a run that continues from there
    leaves the file of one that never stopped. Raises UserError for a line that is not JSON."""
    if not path.exists():
        return
    text = path.read_text()
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        del lines[-1]
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= step]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} has a line that is not a JSON object with a step.") from None
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)

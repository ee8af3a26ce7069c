"""What a run tells: metrics.jsonl, TensorBoard event files, trackers and a progress bar, all from process 0 alone.

In a bucket files are copies of those on this machine (runs/mirror.py). A line of metrics.jsonl is one JSON object:

    {"step": 500, "split": "train", "epoch": 2.5, "loss": .., "loss_ce": .., "lr": .., "images_per_second": ..,
     "host_memory_gib": ..}
    {"step": 500, "split": "validation", "epoch": 2.5, "AP": .., "AP50": ..}

Training lines are means over the steps since the line before; `lr` is the last step's, memory the most until then
(memory.py). `step` counts finished steps.
"""

import contextlib
import copy
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import reason, write_whole
from deperceiver_jax.runs.metrics_file import read_metrics
from deperceiver_jax.runs.mirror import Mirror
from deperceiver_jax.runs.workdir import METRICS
from deperceiver_jax.training.memory import peak_memory
from deperceiver_jax.training.trackers import Images, Trackers

TRAIN = "train"  # the split of a training line
# Beside the total: the answer's own terms.
SHOWN = ("loss_ce", "loss_focal", "loss_iou_aware", "loss_bbox", "loss_giou")


class MetricLog:
    """The log of the steps of one run. `progress` is what the checkpoint before the first of them keeps of it."""

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        *,
        steps: range,
        steps_per_epoch: int,
        writes: bool,
        progress: dict | None = None,
    ):
        start_step, self.num_steps = steps.start - 1, steps.stop - 1
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = config.data.batch_size
        self.log_every = config.train.log_every
        self.writes = writes
        self.window: dict = progress["window"] if progress else {"count": 0, "sums": {}}
        self.step = start_step
        self.bar: tqdm | None = None
        self.until_end = contextlib.ExitStack()
        rows: list[dict] = []
        if writes:
            self.mirror = Mirror(workdir, self.until_end)
            folder = self.mirror.folder
            rows = forget_after(workdir / METRICS, start_step, folder / METRICS)
            self.file = open(folder / METRICS, "ab", buffering=0)  # nothing is left for close() to write
            self.tensorboard = SummaryWriter(str(folder), purge_step=start_step + 1)
            self.trackers = Trackers(config.train.trackers, workdir, config, folder)
        self.rows = from_first(rows)
        self.start_clock()

    def start_clock(self) -> None:
        """Measures speed from the next step on: before the first one the loader starts."""
        self.clock: float | None = None
        self.clock_step = self.step
        if self.writes and sys.stderr.isatty():
            start = self._bar_format("")
            self.bar = tqdm(initial=self.step, total=self.num_steps, bar_format=start, dynamic_ncols=True, leave=False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A time that does not count as training; the bar makes room for another one."""
        self._close_bar()
        yield
        self.start_clock()

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes a finished step; writes a line after every log_every steps and after the last."""
        self.step = step
        if self.clock is None:
            self.clock, self.clock_step = time.perf_counter(), step
        self.window["count"] += 1
        sums = self.window["sums"]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
        if self.bar is not None:
            self.bar.bar_format = self._bar_format(self._text(metrics))
            self.bar.update(1)
        if step % self.log_every == 0 or step == self.num_steps:
            means = self._means()
            means |= {"lr": metrics["lr"]} | ({"images_per_second": speed} if (speed := self._speed()) else {})
            self._write(TRAIN, means | peak_memory())
            if self.writes and self.bar is None:
                print(f"step {step}/{self.num_steps}  {self._text(means)}  {self._speed_text()}", flush=True)
            self.window = {"count": 0, "sums": {}}
            self.clock, self.clock_step = time.perf_counter(), step

    def evaluation(self, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of the state after the current step on a split of the data."""
        self._write(split, metrics)
        if self.writes:
            shown = "  ".join(
                f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "APs", "APm", "APl") if name in metrics
            )
            print(f"step {self.step}/{self.num_steps}  {split}  {shown}", flush=True)
        self._flush()  # which step is the best is read there

    def images(self, split: str, images: Images) -> None:
        """Shows the trackers a few evaluated pictures, by file name."""
        self.trackers.images(self.step, f"{split}/images", images)

    def lines(self, split: str) -> list[dict]:
        """What metrics.jsonl has of `split`, also of the run that this one continues; the same in all processes."""
        return [row for row in self.rows if row["split"] == split]

    def training_lines(self) -> list[dict]:
        """Those of training, and what the next one would say now."""
        unfinished = [{"step": self.step, "split": TRAIN, **self._means()}] if self.window["count"] else []
        return [*self.lines(TRAIN), *unfinished]

    def has(self, step: int, split: str) -> bool:
        """Whether there is a line of `split` after `step`."""
        return any(row["step"] == step for row in self.lines(split))

    def progress(self) -> dict:
        """What the next line needs of the steps before it, for a run that continues from here.

        The workdir has all lines until now when it returns: a run that continues does not write them again.
        """
        self._flush()
        return {"window": copy.deepcopy(self.window)}  # which is written in the background, while steps go on

    def close(self) -> None:
        """Takes the bar away and writes what is still in memory."""
        self._close_bar()
        with self.until_end:
            if self.writes:
                self.file.close()
                self.tensorboard.close()
                self.trackers.close()
                self.mirror.close()

    def _flush(self) -> None:
        if self.writes:
            self.tensorboard.flush()
            self.mirror.flush()

    def _means(self) -> dict[str, float]:
        return {name: value / self.window["count"] for name, value in self.window["sums"].items()}

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speed(self) -> float | None:
        """Images per second since the clock was started; None while there is nothing to measure."""
        images = (self.step - self.clock_step) * self.batch_size
        return images / (time.perf_counter() - self.clock) if images and self.clock else None

    def _speed_text(self) -> str:
        return f"{speed:.3g} images/s" if (speed := self._speed()) else "starting"

    def _text(self, metrics: Mapping[str, float]) -> str:
        names = ["loss", *(name for name in SHOWN if name in metrics)]
        return " ".join(f"{name.removeprefix('loss_')} {metrics[name]:.3g}" for name in names)

    def _bar_format(self, text: str) -> str:
        """tqdm's template. A terminal of 80 columns has room for the numbers or for a bar."""
        bar = "|{bar}|" if shutil.get_terminal_size().columns >= 100 else ""
        times = f"[{{elapsed}}<{{remaining}}, {self._speed_text()}]"
        return f"{{percentage:3.0f}}%{bar} {{n_fmt}}/{{total_fmt}} {times} {text}"

    def _write(self, split: str, metrics: Mapping[str, float]) -> None:
        head = {"step": self.step, "split": split, "epoch": round(self.step / self.steps_per_epoch, 4)}
        self.rows.append({**head, **metrics})
        if not self.writes:
            return
        try:
            self.file.write(f"{json.dumps(self.rows[-1])}\n".encode())
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written: {reason(error)}.") from error
        for name, value in metrics.items():
            self.tensorboard.add_scalar(f"{split}/{name}", value, self.step)
        self.trackers.numbers(self.step, {f"{split}/{name}": value for name, value in metrics.items()})


def from_first(rows: list[dict]) -> list[dict]:
    """What process 0 passes, in every process."""
    if jax.process_count() == 1:
        return rows
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    return json.loads(sent.astype(np.uint8).tobytes())


def forget_after(path: Path, step: int, target: Path) -> list[dict]:
    """Drops the lines of steps after `step`, and a last line that was cut off, so that a run that continues from there
    leaves the file of one that never stopped. `target` gets those that stay, and what they say is returned.

    Lines that are no metrics are dropped, too; the file with them is kept beside it, and a warning says so.
    """
    if not path.exists():
        return []
    lines = read_metrics(path)
    if lines.garbage:
        damaged = path.with_name(f"{path.name}.damaged")
        write_whole(damaged, path.read_bytes())
        more = f" (and {len(lines.garbage) - 1} more)" if lines.garbage[1:] else ""
        what = f"warning: line {lines.garbage[0]} of {path}{more} is no line of metrics and is dropped"
        print(f"{what}; {damaged} is the file as it was.", file=sys.stderr, flush=True)
    kept = [(line, row) for line, row in lines.rows if row["step"] <= step]
    write_whole(target, "".join(f"{line.decode()}\n" for line, _ in kept))
    return [row for _, row in kept]

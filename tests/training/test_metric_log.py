"""metrics.jsonl: means between lines, a resumed run's file, and who writes."""

import json

import pytest
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.checkpoint_files import best_step
from deperceiver_jax.training.metric_log import MetricLog, forget_after


def open_log(workdir, start_step=0, progress=None, writes=True):
    config = ConfigDict({"data": {"batch_size": 8}, "train": {"log_every": 3, "trackers": ()}})
    steps = range(start_step + 1, 8)
    return MetricLog(workdir, config, steps=steps, steps_per_epoch=4, writes=writes, progress=progress)


def lines_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop(name, 1.0) > 0 for line in lines for name in ("images_per_second", "host_memory_gib"))
    return lines


def step_metrics(step):
    return {"loss": float(step), "loss_bbox": 0.1 * step, "lr": 1.0 / step}


def test_lines_are_means_since_the_line_before(tmp_path, capsys):
    log = open_log(tmp_path)
    for step in range(1, 8):
        log.training(step, step_metrics(step))
        if step == 4:
            log.evaluation("validation", {"AP": 0.5})
    log.close()
    lines = lines_of(tmp_path)
    assert [(line["step"], line["split"], line["epoch"]) for line in lines] == [
        (3, "train", 0.75),
        (4, "validation", 1.0),
        (6, "train", 1.5),
        (7, "train", 1.75),  # the last step is always told
    ]
    assert lines[0] | {"loss": 2.0, "loss_bbox": pytest.approx(0.2), "lr": 1 / 3} == lines[0]
    assert (lines[2]["loss"], lines[3]["loss"], lines[1]["AP"]) == (5.0, 7.0, 0.5)
    assert "step 3/7  loss 2 bbox 0.2  " in capsys.readouterr().out
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("saved_at", [2, 3, 5])
def test_an_interrupted_file_reads_as_if_it_never_was(tmp_path, saved_at):
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    log = open_log(tmp_path / "whole")
    for step in range(1, 8):
        log.training(step, step_metrics(step))
    log.close()

    log = open_log(tmp_path / "resumed")
    for step in range(1, 7):
        log.training(step, step_metrics(step))
        if step == saved_at:
            progress = json.loads(json.dumps(log.progress()))
    log.close()
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "spl')  # killed while writing
    log = open_log(tmp_path / "resumed", saved_at, progress)
    for step in range(saved_at + 1, 8):
        log.training(step, step_metrics(step))
    log.close()
    assert lines_of(tmp_path / "resumed") == lines_of(tmp_path / "whole")


def test_other_processes_write_nothing(tmp_path):
    log = open_log(tmp_path, writes=False)
    for step in range(1, 8):
        log.training(step, step_metrics(step))
    log.evaluation("validation", {"AP": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 200,
        b"loss 3",
        b'{"step": 2, "spl',
        b"[1, 2]",
        b"7",
        b'{"split": "train"}',
        b'{"step": "2", "split": "x"}',
    ]
    + [b"\xff\xfe{}", b"[" * 100_000],
)
def test_garbage_is_dropped_and_kept_beside(tmp_path, garbage, capsys):
    """As a crash of the machine leaves it, or a person; also as the only line."""
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "split": "train"}', b'{"step": 3, "split": "validation", "AP": 0.5}']
    for lines in ([rows[0], garbage, garbage, rows[1]], [garbage]):
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert best_step(tmp_path, [1, 3]) == (3 if rows[1] in lines else None)
        stay = [(row["step"], row["split"]) for row in forget_after(path, 3, path)]
        assert stay == ([(1, "train"), (3, "validation")] if rows[1] in lines else [])
        assert path.read_bytes() == b"".join(line + b"\n" for line in lines if line != garbage)
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines) + b"\n"
        first, more = (2, " (and 1 more)") if rows[1] in lines else (1, "")
        sentence = f"warning: line {first} of {path}{more} is no line of metrics and is dropped; {path}.damaged is "
        assert capsys.readouterr().err.startswith(sentence)


def test_the_best_step_is_by_numbers(tmp_path):
    aps = {1: 0.25, 2: "NaN", 3: "null", 4: '"0.9"', 5: 0.125}
    lines = [f'{{"step": {step}, "split": "validation", "AP": {ap}}}\n' for step, ap in aps.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert best_step(tmp_path, list(aps)) == 1
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read: Is a directory."):
        best_step(tmp_path, [1])

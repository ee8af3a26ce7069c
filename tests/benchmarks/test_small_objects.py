"""The ladder's rows build one on the other, and the report says what the runs were."""

import json
import math

import pytest

from benchmarks.small_objects import (
    compare_rates,
    main,
    make_table,
    reached,
    read_curves,
    read_rows,
    read_run,
    spread,
    steps_to,
    train,
    write_curves,
)
from configs import ladder


def write_run(directory, ap50):
    """A finished run of 20 steps that evaluated twice."""
    (directory / "run").mkdir(parents=True)
    lines = [{"step": 5 * i, "split": "train", "images_per_second": rate} for i, rate in enumerate((1.0, 16.0, 32.0))]
    for step, value in zip((10, 20), ap50, strict=True):
        metrics = {"AP": value / 2, "AP50": value, "APs": value / 4, "APm": 0.1, "APl": 0.2}
        lines.append({"step": step, "split": "validation", **metrics})
    (directory / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "run/config.json").write_text('{"data": {"batch_size": 8}}')
    (directory / "run.json").write_text('{"seconds": 9.0, "peak_gib": 1.5, "fields": ["--config.a=1"]}')
    return read_run(directory)


def test_the_table_has_means_ranges_and_steps(tmp_path):
    slow, fast = write_run(tmp_path / "0", (0.1, 0.4)), write_run(tmp_path / "1", (0.3, 0.6))
    assert steps_to(slow, 0.3) == 20 and steps_to(fast, 0.3) == 10 and steps_to(slow, 0.5) is None
    head, _, line = make_table({"detr": [slow, fast]}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert cells["AP50"] == "0.500 [0.400, 0.600]" and cells["APs/AP"] == "0.500 [0.500, 0.500]"
    assert cells["steps to AP50 0.3"] == "15" and cells["steps to AP50 0.5"] == "20 (1 of 2 never)"
    assert cells["s/step"] == "0.33" and cells["GiB"] == "1.5"  # 16 and 32 images a second: the median is 24


def test_curves_are_kept_and_drawn_again(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / seed, ends) for seed, ends in (("0", (0.1, 0.4)), ("1", (0.3, 0.6)))]
    file = write_curves({"detr": runs}, tmp_path / "curves.csv")
    assert read_curves(file) == {"detr": [run.curve for run in runs]}
    # A seed of which little is known is drawn as far as it goes.
    file.write_text(file.read_text() + "detr,2,10,,0.2,0.05,,\ndetr,2,20,,0.5,0.125,,\nsmca,0,20,0.1,0.2,0.1,0.1,-1\n")
    file.write_text(file.read_text() + "published,0,20,,0.1,0.1,,\n")
    assert read_curves(file)["detr"][2] == [(10, {"AP50": 0.2, "APs": 0.05}), (20, {"AP50": 0.5, "APs": 0.125})]
    monkeypatch.setattr("sys.argv", ["small_objects.py", f"--draw={file}"])
    main()
    assert capsys.readouterr().out == f"Drew {tmp_path}/curves.png.\n"
    assert (tmp_path / "curves.png").stat().st_size > 10_000

    monkeypatch.setattr("sys.argv", ["small_objects.py", f"--draw={tmp_path}/none.csv"])
    with pytest.raises(SystemExit):
        main()
    assert f"error: --draw: there is no file {tmp_path}/none.csv." in capsys.readouterr().err


def test_rates_are_compared_by_their_mean(tmp_path):
    ends = {"lr1e-3": {"0": 0.4, "1": 0.6}, "lr3e-3": {"0": 0.7}}
    for rate, seeds in ends.items():
        for seed, end in seeds.items():
            write_run(tmp_path / rate / "detr" / seed, (0.1, end))
    runs = {rate: read_rows(tmp_path / rate, ["detr", "smca"]) for rate in (*ends, "lr1")}
    assert compare_rates(runs).splitlines()[2:] == ["| detr | 0.500 | 0.700 | - | lr3e-3 |"]


def test_a_finished_run_with_other_fields_is_not_taken_for_this_one(tmp_path):
    write_run(tmp_path / "detr" / "3", (0.1, 0.4))
    train("detr", 3, tmp_path, ["--config.a=1"])  # finished: nothing to do
    with pytest.raises(SystemExit, match="detr/3 is a finished run with --config.a=1. For other fields, take another"):
        train("detr", 3, tmp_path, [])


def test_nothing_reached_is_said():
    assert reached([None, None]) == "never" and spread([1.0, math.nan]) == "-"


def test_every_row_changes_something_and_keeps_the_data():
    configs = {name: ladder.get_config(name) for name in ladder.ROWS}
    texts = [config.to_json() for config in configs.values()]
    assert len(set(texts)) == len(texts)
    for config in [*configs.values(), *map(ladder.get_config, ladder.FAMILIES)]:
        assert config.data == configs["published"].data and config.train == configs["published"].train
        assert config.model.backbone == configs["published"].model.backbone
        assert {**config.optimizer, "learning_rate": 0.0} == {**configs["published"].optimizer, "learning_rate": 0.0}
    assert len({config.optimizer.learning_rate for config in configs.values()}) == 1
    with pytest.raises(ValueError, match="has no variant 'rungs'"):
        ladder.get_config("rungs")

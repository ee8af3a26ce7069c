"""Runs compared as a person compares them: the table, the page, and what goes wrong."""

import json
import re
import statistics

import pytest

from deperceiver_jax.compare import __main__ as program
from deperceiver_jax.compare.compare import SHOWN, count_runs
from deperceiver_jax.compare.rows import (
    PUBLISHED,
    group,
    intervals,
    learning_curves,
    names_of,
    published_rows,
    read_run,
)
from deperceiver_jax.evaluation.coco_metric import SUMMARY
from deperceiver_jax.program.command_line import run


def compare(*arguments):
    return run(program.main, ["compare", *map(str, arguments)])


def columns_of(printed):
    head, *lines = (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines() if "  " in line)
    return [dict(zip(head, line, strict=False)) for line in lines]


def test_two_runs(make_run, tmp_path, capsys):
    """AP of both, and their difference with an interval around it, which is the whole of it where runs are the same."""
    (first, good), (other, poor), (again, _) = make_run("a", 0), make_run("b", 8, width=3), make_run("c", 0, width=4)
    output = tmp_path / "compare.html"
    assert compare(first, other, again, f"--output={output}", "--published=smca,deperceiver") == 0
    printed = capsys.readouterr().out
    rows = columns_of(printed)
    assert [row["run"] for row in rows[:3]] == ["a", "b", "c"] and rows[0]["AP"] == f"{good['AP']:.3f}"
    assert rows[1]["AP"] == f"{poor['AP']:.3f}" and rows[0]["APs/AP"] == f"{good['APs_over_AP']:.3f}"
    text = (tmp_path / "compare.html").read_text()
    found = re.search(r"([+-][\d.]+)<br>\[([+-][\d.]+), ([+-][\d.]+)\]", text)
    change, low, high = map(float, found.groups())
    assert change == pytest.approx(poor["AP"] - good["AP"], abs=6e-4) and low <= change <= high < 0
    same = text.partition('<th scope="row">c</th>')[2].partition("</tr>")[0]
    assert same.count("+0.000<br>[+0.000, +0.000]") == sum(good[name] >= 0 for name in SHOWN if name != "APs_over_AP")
    published = published_rows(["smca", "deperceiver"])
    assert printed.count("published: ") == text.count("<small>published</small>") == len(published) > 4
    assert all(row.source in text for row in published)


def test_seeds_are_one_row(make_run, tmp_path, capsys):
    """Two seeds: mean and standard deviation; the interval is of the difference of the means."""
    (first, a), (second, b), (other, c) = make_run("a", 2, seed=1), make_run("b", 6, seed=2), make_run("c", 8, width=3)
    assert compare(first, other, second, f"--output={tmp_path}/compare.html", "--bootstrap=40") == 0
    rows = columns_of(capsys.readouterr().out)
    assert [row["run"] for row in rows[:2]] == ["a (2 seeds)", "c"]
    values = [a["AP"], b["AP"]]
    assert rows[0]["AP"] == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    change, low, high = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", rows[1]["AP - first"]).groups())
    assert change == pytest.approx(c["AP"] - statistics.fmean(values), abs=6e-4) and low <= change <= high
    assert rows[1]["GiB"] == "1.98 host" and rows[1]["ms/step"] == "2000"


def test_a_seed_that_is_there_twice_tells_nothing_about_seeds(make_run):
    runs = [read_run(make_run(name, 2, seed)[0], name) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    rows = group(runs, 0)
    assert [[run.name for run in row.runs] for row in rows] == [["a", "c"], ["b"]]
    assert rows[0].spread and not rows[1].spread


def test_intervals_of_means(make_run):
    """Seeds that answer alike are one run drawn on the same images; means move no further than their runs."""
    folders = [make_run(name, near, width=width)[0] for name, near, width in (("a", 2, 1), ("b", 6, 2), ("c", 8, 3))]
    runs = [read_run(folder, folder.name) for folder in folders]
    a, b, c = count_runs(runs).values()
    alone, alike = (intervals([a], others, 30) for others in ([b, b], [b, b, b]))
    assert alone.keys() == alike.keys()
    assert [alone[name] for name in alone] == [pytest.approx(alike[name]) for name in alone]
    of_b, of_c = alone["AP"], intervals([a, a], [c], 30)["AP"]
    low, high = intervals([a], [b, c], 30)["AP"]
    assert min(of_b[0], of_c[0]) <= low < high <= max(of_b[1], of_c[1])
    assert intervals([a, b], [b, a], 30)["AP"] == pytest.approx((0, 0))
    assert intervals([a], [b], 0) == {}
    from_one_call = intervals([a], [b], 400)["AP"]  # other draws of the same images
    assert of_b == pytest.approx(from_one_call, abs=0.05)


def test_median_of_the_last_evaluations(make_run, capsys):
    (first, metrics), (other, _) = make_run("a", 0), make_run("b", 8, width=3)
    rows = group([read_run(first, "a"), read_run(other, "b")], median_of_last=3)
    assert rows[0].metrics["AP"] == pytest.approx(metrics["AP"] * 30 / 40)
    assert compare(first, other, "--median_of_last=9") == 1
    assert f"{first} has 4 evaluations; --median_of_last is 9." in capsys.readouterr().err


def test_learning_curves(make_run):
    """40 steps of 16 images at 8 a second are 80 seconds."""
    folder, metrics = make_run("a", 0)
    stored = read_run(folder, "a")
    curve = learning_curves(stored)
    batch = stored.config.data.batch_size
    assert [row["loss"] for row in curve if "loss" in row] == [5, 2.5, 1.6667, 1.25]
    last = curve[-1]
    assert last["images"] == 40 * batch and last["hours"] == pytest.approx(40 * batch / 8 / 3600, abs=1e-5)
    assert last["AP"] == metrics["AP"] and last["epoch"] == 4


def test_published_rows():
    """Every one has its source and figures in the order of the statistics; of a family there is nothing, or all."""
    stored = json.loads(PUBLISHED.read_text())
    rows = published_rows(sorted({entry["family"] for entry in stored}))
    assert len(rows) == len(stored) > 30
    for row in rows:
        assert row.source and set(row.metrics) <= set(SUMMARY) and all(0 < value < 1 for value in row.metrics.values())
        if "AP50" in row.metrics:
            assert row.metrics["AP50"] > row.metrics["AP75"] and row.metrics["AP50"] > row.metrics["AP"]
        if "APs" in row.metrics:
            assert row.metrics["APs"] < row.metrics["APm"] < row.metrics["APl"]


def test_names_tell_runs_apart(tmp_path):
    assert names_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_mistakes_are_one_sentence(make_run, tmp_path, capsys):
    (first, _), (other, _) = make_run("a", 0), make_run("b", 0)

    def sentence(*arguments):
        assert compare(*arguments) == 1
        return capsys.readouterr().err

    assert "name two workdirs or more" in sentence(first)
    assert "A workdir is given twice." in sentence(first, first)
    assert "--published is 'yolo'; it can be atss," in sentence(first, other, "--published=yolo")
    assert "takes no config" in sentence(first, other, "--config.seed=3")
    assert f"{tmp_path}/none" in sentence(first, tmp_path / "none")
    text = (other / "classes.json").read_text()
    (other / "classes.json").write_text(text.replace("green", "blue"))
    assert f"The classes of {first} and {other} differ" in sentence(first, other)
    (other / "classes.json").write_text(text)
    detections = json.loads((other / "eval" / "40" / "detections.json").read_text())
    detections[0]["image_id"] = 5
    (other / "eval" / "40" / "detections.json").write_text(json.dumps(detections))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 7, "precision": "bfloat16"}))
    assert f"{other} was evaluated on other images than {first}: 5." in sentence(first, other)
    for folder, boxes in ((first, 2), (other, 4)):
        data = {"images": 3, "boxes": boxes, "hash": str(boxes)}
        (folder / "eval" / "40" / "data.json").write_text(json.dumps(data))
    told = f"{other} was evaluated on other data than {first}: 3 images with 2 boxes there, 3 images with 4 boxes here."
    assert told in sentence(first, other, "--bootstrap=0")
    (other / "eval" / "40" / "data.json").unlink()
    (folder := tmp_path / "folder.html").mkdir()
    assert f"--output: {folder} is a folder." in sentence(first, other, "--output", folder)
    assert "must end in .html" in sentence(first, other, f"--output={tmp_path}/a.pdf")
    (other / "eval" / "40" / "metrics.json").write_text("{}")
    assert "was written before 0.2.0" in sentence(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(make_run, tmp_path, browser, width):
    (first, metrics), (other, _) = make_run("a", 0), make_run("b", 8, width=3)
    output = tmp_path / "compare.html"
    assert compare(first, other, f"--output={output}", "--published=detr") == 0
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(output.as_uri())
    drawn = "const done = arguments[0]; const look = () => document.querySelectorAll('.chart svg').length === 3"
    browser.execute_async_script(f"{drawn} ? done() : setTimeout(look, 50); look();")
    assert browser.get_log("browser") == []
    page, whole, shown = browser.execute_script(
        "const e = document.documentElement; return [e.clientWidth, e.scrollWidth,"
        " document.querySelector('#runs tbody td[data-metric=AP]').textContent.trim()]"
    )
    assert whole == page and shown == f"{metrics['AP']:.3f}"
    browser.execute_script("document.querySelectorAll('#runs thead button')[1].click()")
    order = browser.execute_script(
        "return [...document.querySelectorAll('#runs tbody td[data-metric=AP]')].map((e) => Number(e.dataset.value))"
    )
    assert order == sorted(order, reverse=True) and len(order) == 2 + len(published_rows(["detr"]))

"""The report in a real browser, as wide as a phone and as a desk: it shows metrics.json, and its controls work."""

import json

import pytest

from deperceiver_jax.evaluation.coco_metric import SUMMARY
from deperceiver_jax.report.page import write_report
from tests.browser_page import set_control, texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(evaluated, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        path, evaluated.source, evaluated.metrics, evaluated.results, evaluated.config, split="validation", step="7"
    )
    return path.as_uri()


@pytest.fixture(params=[390, 1280])
def opened(request, browser, address):
    """The report at one width, with every chart drawn. What it said and loaded on the way is empty at the end."""
    size = {"width": request.param, "height": 844, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(address)
    browser.set_script_timeout(30)
    drawn = "const done = arguments[0]; const look = () => document.querySelectorAll('.chart svg').length === 6"
    browser.execute_async_script(f"{drawn} ? done() : setTimeout(look, 50); look();")
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    loaded = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in loaded if not url.startswith("data:")] == [address]


def shown(value):
    return "–" if value is None or value < 0 else f"{value:.3f}"


def test_it_shows_metrics_json(opened, evaluated):
    metrics = evaluated.metrics
    for name in SUMMARY:
        assert texts(opened, f"[data-metric='{name}']") == [shown(metrics[name])]
    columns = texts(opened, "#class-table thead th")[1:]
    for row in metrics["by_class"]:
        cells = texts(opened, f"#class-table tr[data-category='{row['category_id']}'] td")
        expected = [str(row[column]) if column == "boxes" else shown(row[column]) for column in columns]
        assert cells == expected
    assert texts(opened, "#class-table tbody th") == ["white", "green"]
    bars = texts(opened, "#sizes svg .role-mark.mark-text text")
    assert [text for text in bars if text] == [shown(row["AP"]) for row in metrics["by_size"] if row["AP"] >= 0]


def test_it_fits_the_width(opened):
    """Nothing is wider than the page, but for tables, which scroll in their own frame; charts fill their place."""
    width, whole = opened.execute_script("const e = document.documentElement; return [e.clientWidth, e.scrollWidth]")
    assert whole == width
    overflow = opened.execute_script(
        "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg, .frame, details')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert overflow == []
    for place, drawing in opened.execute_script(
        "return [...document.querySelectorAll('.chart')].map((e) => [e.clientWidth,"
        " e.querySelector('svg').getBoundingClientRect().width])"
    ):
        assert 0.9 * place < drawing <= place + 1


def test_classes_are_sorted(opened, evaluated):
    rows = evaluated.metrics["by_class"]

    def touch(column):
        opened.execute_script(f"document.querySelectorAll('#class-table thead button')[{column}].click()")
        return texts(opened, "#class-table tbody th")

    assert touch(0) == ["green", "white"] and touch(0) == ["white", "green"]
    falling = [row["name"] for row in sorted(rows, key=lambda row: -row["AP"])]
    assert rows[0]["AP"] != rows[1]["AP"] and touch(2) == falling and touch(2) == falling[::-1]
    assert opened.execute_script("return document.querySelectorAll('#class-table [aria-sort=ascending]').length") == 1


def test_slider_and_filters_of_the_pictures(opened, evaluated):
    """At a threshold the page draws the detections from it on, and says how many boxes they find."""
    results = evaluated.results
    set_control(opened, "kind", "")
    images = texts(opened, "#pictures figcaption")
    assert 5 <= len(images) <= len(evaluated.source)
    files = {evaluated.source.filename(i): int(evaluated.source.image_ids[i]) for i in range(len(evaluated.source))}
    ids = {files[caption.rpartition(":")[0]] for caption in images}

    def drawn():
        return len(texts(opened, "#pictures .box.right")) + len(texts(opened, "#pictures .box.wrong"))

    counts = []
    for least in (0, 0.5, 0.68, 1):
        set_control(opened, "slider", least)
        assert texts(opened, "#least") == [f"{least:.2f}"]
        assert drawn() == sum(r["score"] >= least and r["image_id"] in ids for r in results)
        (tally,) = texts(opened, "#tally")
        right = len(texts(opened, "#pictures .box.right"))
        missed = len(texts(opened, "#pictures .box.missed"))
        assert f": {right} of {right + missed} boxes found, {drawn() - right} wrong" in tally
        counts.append(right)
    assert counts[0] > counts[2] > counts[3] == 0

    set_control(opened, "slider", 0)
    set_control(opened, "class-filter", 1)
    green = [r for r in results if r["category_id"] == 30 and r["image_id"] in ids]
    assert drawn() == len(green) and all(text.startswith("green") for text in texts(opened, "#pictures .box span"))
    set_control(opened, "kind", "worst")
    assert len(texts(opened, "#pictures figure")) <= 4
    loaded = opened.execute_script("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert loaded


def test_a_class_is_chosen_for_a_chart(opened):
    paths = (
        "return [...document.querySelectorAll('#precision_recall svg .mark-line path')].map((e) => e.getAttribute('d'))"
    )
    before = opened.execute_script(paths)
    options = texts(opened, "#precision_recall select option")
    assert options == ["all classes", "white", "green"]
    opened.execute_async_script(
        "const done = arguments[0], e = document.querySelector('#precision_recall select');"
        "e.value = 'green'; e.dispatchEvent(new Event('change', {bubbles: true})); setTimeout(done, 200);"
    )
    after = opened.execute_script(paths)
    assert len(after) == len(before) == 3 and after != before

"""The page in a real browser, as wide as a phone and as a desk: pictures in, boxes, attention, download."""

import io
import json
import time

import pytest
from PIL import Image

from benchmarks.app_load import ask, draw
from tests.browser_page import set_control, texts

pytestmark = pytest.mark.slow


def wait(browser, condition, *arguments, seconds=120):
    """Until a JavaScript expression is true; its value."""
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {condition}", *arguments)):
        assert time.monotonic() < end, condition
        time.sleep(0.05)
    return value


def drop(browser, files):
    """As from a file manager, onto the place for it."""
    x, y = browser.execute_script(
        "const r = document.getElementById('drop').getBoundingClientRect(); return [r.x + r.width / 2, r.y + 20]"
    )
    dragged = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": dragged})


@pytest.fixture(params=[390, 1280])
def opened(request, browser, app, tmp_path):
    """The page at one width. It says nothing on the way, the network's word on refusals aside, and asks no one else."""
    size = {"width": request.param, "height": 844, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    address = f"http://127.0.0.1:{app.port}/"
    browser.get(address)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "network"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    loaded = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith((address, "data:", f"blob:{address}")) for url in loaded)
    width, whole = browser.execute_script("const e = document.documentElement; return [e.clientWidth, e.scrollWidth]")
    assert whole == width
    browser.get("about:blank")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(draw(1))).save(folder / "phone.jpg", exif=exif)
    (folder / "a.png").write_bytes(draw(2))
    (folder / "notes.png").write_text("no picture")
    return [folder / name for name in ("phone.jpg", "a.png", "notes.png")]


def test_from_a_dropped_picture_to_a_download(opened, app, pictures, tmp_path):
    answers = [ask(app.port, picture.read_bytes())[1]["detections"] for picture in pictures[:2]]
    found = [one for answer in answers for one in answer]
    drop(opened, pictures)
    wait(opened, "document.querySelectorAll('figure').length === 3 && !document.querySelector('.busy')")
    assert texts(opened, "figcaption.failed") == [
        "notes.png: The file is not a JPEG, PNG, WebP, AVIF, GIF or BMP picture."
    ]
    # A picture that a phone lays down stands as its boxes do.
    assert opened.execute_script("return [...document.images].slice(0, 2).every((i) => i.naturalWidth > 0)")
    (wide, high), (width, height) = opened.execute_script(
        "const i = document.images[0], r = i.getBoundingClientRect();"
        "return [[i.naturalWidth, i.naturalHeight], [r.width, r.height]]"
    )
    assert wide < high and width / height == pytest.approx(wide / high, rel=0.02)

    # The slider and the filter choose among what was found; nothing is asked for again.
    opened.get_log("performance")
    scores = sorted(one["score"] for one in found)
    for least in (0, 0.01 * int(100 * scores[3]), 0.01 * int(100 * scores[7]), 1):
        set_control(opened, "slider", f"{least:.2f}")
        shown = [one for one in found if one["score"] >= float(f"{least:.2f}")]
        assert texts(opened, "#least") == [f"{least:.2f}"]
        assert sorted(texts(opened, ".box")) == sorted(f"{one['name']} {one['score']:.2f}" for one in shown)
        assert texts(opened, "#tally") == [f"2 of 3 pictures, {len(shown)} objects"]
    set_control(opened, "slider", 0)
    name = found[0]["name"]
    assert texts(opened, "#class-filter option") == ["all classes", *sorted({one["name"] for one in found})]
    set_control(opened, "class-filter", name)
    of_class = [one for one in found if one["name"] == name]
    assert len(texts(opened, ".box")) == len(of_class)
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    assert not [e for e in events if e["method"] == "Network.requestWillBeSent"]

    # The download is what is shown, in COCO's results format.
    opened.find_element("id", "download").click()
    file = tmp_path / "detections.json"
    end = time.monotonic() + 30
    while not file.is_file():
        assert time.monotonic() < end
        time.sleep(0.05)
    results = json.loads(file.read_text())
    assert [(row["image_id"], row["file_name"]) for row in results] == [
        (k, picture.name) for k, picture in enumerate(pictures[:2]) for one in answers[k] if one["name"] == name
    ]
    for row, one in zip(results, of_class, strict=True):
        left, top, right, bottom = one["box"]
        assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
        assert row["score"] == pytest.approx(one["score"], abs=1e-6)
        assert (row["category_id"], row["category_name"]) == (one["category_id"], one["name"])

    opened.find_element("id", "clear").click()
    assert texts(opened, "figure img") == [] and texts(opened, "#tally") == [""]


def test_a_webp_is_turned_where_the_browser_does_not(opened, tmp_path):
    """Red at the left of the stored picture, which is the top of the one that is seen."""
    image = Image.new("RGB", (200, 100), "blue")
    image.paste("red", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.webp", exif=exif, lossless=True)
    opened.find_element("id", "files").send_keys(str(tmp_path / "phone.webp"))
    wait(opened, "document.querySelector('figcaption') && !document.querySelector('.busy')")
    set_control(opened, "slider", 1)
    wait(opened, "[...document.images].every((i) => i.complete)")
    opened.execute_script("document.querySelector('.controls').style.position = 'static'")  # it would lie above
    with Image.open(io.BytesIO(opened.find_element("css selector", ".frame").screenshot_as_png)) as seen:
        width, height = seen.size
        tones = [seen.convert("RGB").getpixel((x * width // 4, y * height // 4)) for x in (1, 3) for y in (1, 3)]
    assert tones == [(255, 0, 0), (0, 0, 255)] * 2


def test_a_box_shows_where_its_query_looked(opened, pictures):
    opened.find_element("id", "files").send_keys(str(pictures[1]))
    wait(opened, "document.querySelector('figcaption') && !document.querySelector('.busy')")
    set_control(opened, "slider", 0)
    box = opened.find_elements("css selector", ".box")[-1]  # the smallest: no other lies above it
    text = box.text
    box.click()
    wait(opened, "document.querySelectorAll('dialog .panels img').length > 0")
    wait(opened, "[...document.querySelectorAll('dialog img')].every((i) => i.complete && i.naturalWidth > 0)")
    assert opened.execute_script("return document.querySelector('dialog').open")
    assert texts(opened, "dialog h2") == [f"Where the query of {text} looked"]
    captions = texts(opened, "dialog .panels.large figcaption")
    assert captions[0].endswith(text) and captions[1] == "attention through latents, all heads"
    assert len(texts(opened, "dialog .panels:not(.large) figure")) >= 8
    assert "Queries look at latents" in texts(opened, "dialog .note")[0]
    opened.find_element("css selector", "dialog button").click()
    assert not opened.execute_script("return document.querySelector('dialog').open")

"""The app over HTTP: answers are predict's, each goes to who asked, and what is refused gets a sentence."""

import base64
import http.client
import io
import json
import logging
import socket
import threading
import time
import zlib
from urllib.parse import urlencode

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks.app_load import ask, draw, encode, load, mutated_files
from deperceiver_jax.app.serve import own_names
from deperceiver_jax.errors import UserError
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.prediction.detector import PictureDetector
from deperceiver_jax.prediction.pictures import prepare, read_pixels
from deperceiver_jax.runs.load_detector import load_detector


@pytest.fixture(scope="module")
def detector(loaded):
    return PictureDetector(loaded)


def turned(picture: bytes) -> bytes:
    """The same as a phone stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("change", [bytes, turned], ids=["upright", "turned"])
def test_answers_are_predicts(app, detector, change):
    picture = change(draw(1))
    status, content = ask(app.port, picture)
    found = detector.predict(picture, threshold=0)
    assert status == 200 and (content["height"], content["width"]) == found.size
    assert found.size == ((212, 167) if change is turned else (167, 212))
    rows = content["detections"]
    np.testing.assert_allclose([row["box"] for row in rows], found.boxes, atol=1e-3)
    np.testing.assert_allclose([row["score"] for row in rows], found.scores, rtol=1e-5)
    for name, values in (("name", found.names), ("label", found.labels), ("category_id", found.category_ids)):
        assert [row[name] for row in rows] == values.tolist()


def test_a_box_leads_to_its_query(app, tiny_run):
    """The query whose box it is by the model itself, seen without the frame's padding."""
    picture = draw(2)
    model, config, _ = load_detector(tiny_run)
    prepared = prepare(read_pixels(picture), config.data, app.service._detector.padded_sizes)
    assert tuple(prepared.size) != prepared.frame.shape[:2]  # there is padding
    answer = jax.jit(lambda *images: model(*normalize_images(*images)))
    predictions = answer(prepared.frame[None], prepared.size[None])
    scores = np.asarray(build_classification(config.loss).scores(predictions.logits[-1]))[0]
    centres = np.asarray(predictions.boxes[-1, 0, :, :2])
    _, content = ask(app.port, picture)
    assert len(content["detections"]) == 5
    queries = []
    for one in content["detections"]:
        middle = (np.array(one["box"][:2]) + one["box"][2:]) / 2 / [content["width"], content["height"]]
        query = np.argmin(np.abs(centres - middle).max(1) + np.abs(scores[:, one["label"]] - one["score"]))
        which = {"box": ",".join(map(str, one["box"])), "label": one["label"], "score": one["score"]}
        status, told = ask(app.port, picture, f"/attention?{urlencode(which)}")
        assert status == 200 and told["query"] == query
        assert told["panels"][0]["caption"] == f"query {query}: {one['name']} {one['score']:.2f}"
        queries.append(told["query"])
    assert sorted(queries) == list(range(5))
    assert "Queries look at latents" in told["note"] and sum(panel["large"] for panel in told["panels"]) == 2
    for panel in told["panels"]:
        with Image.open(io.BytesIO(base64.b64decode(panel["src"].partition(",")[2]))) as image:
            assert abs(image.width / image.height - content["width"] / content["height"]) < 0.02
            assert max(image.size) == (480 if panel["large"] else 240)


def test_everybody_gets_the_own_answer(app):
    """More clients than may wait at one time: none is lost, none mixed up; who is refused comes again."""
    pictures = [draw(number) for number in range(8)]
    expected = [ask(app.port, picture)[1] for picture in pictures]
    assert len({json.dumps(answer["detections"][0]["box"]) for answer in expected}) == 8
    told = load(app.port, pictures, expected, times=6)
    assert [answered.wrong for answered in told] == [[]] * 8
    assert [len(answered.seconds) for answered in told] == [6] * 8


def test_who_comes_when_all_places_are_taken_is_told(app):
    """And those who wait are answered."""
    picture, go, statuses = draw(3), threading.Event(), []
    app.service.queue.submit(go.wait)
    waiting = [threading.Thread(target=lambda: statuses.append(ask(app.port, picture)[0])) for _ in range(6)]
    try:
        for thread in waiting:
            thread.start()
        while app.service._in_hand < 6:
            time.sleep(0.01)
        connection = http.client.HTTPConnection("127.0.0.1", app.port)
        connection.request("POST", "/detect", picture)
        response = connection.getresponse()
        assert response.status == 503 and response.headers["Retry-After"] == "1"
        assert json.loads(response.read()) == {"error": "6 pictures are waiting already; try again in a moment."}
    finally:
        go.set()
    for thread in waiting:
        thread.join()
    connection.request("POST", "/detect", picture)  # on the same connection, whose body had not been read
    assert connection.getresponse().status == 200 and statuses == [200] * 6
    connection.close()


def test_mutated_files_get_a_sentence(app, caplog):
    with caplog.at_level(logging.WARNING):
        for number, file in enumerate(mutated_files(60)):
            status, content = ask(app.port, file)
            assert status == 200 or (400 <= status < 500 and content["error"].endswith(".")), (number, status, content)
    assert not caplog.records


def vast_png() -> bytes:
    whole, side = draw(0), (1200).to_bytes(4)
    header = whole[12:16] + side + side + whole[24:29]
    return whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:]


@pytest.mark.parametrize(
    "path, body, headers, status, sentence",
    [
        ("/detect", b"", {}, 415, "The file is not a JPEG, PNG, WebP, AVIF, GIF or BMP picture."),
        ("/detect", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 415, "The file is not a JPEG"),
        ("/detect", draw(0)[:-30], {}, 422, "The picture is not a whole image: it is a truncated PNG."),
        ("/detect", bytes(1_000_001), {}, 413, "The file has more than 1 MB."),
        ("/detect", iter([bytes(600_000)] * 2), {}, 413, "The file has more than 1 MB."),
        ("/detect", vast_png(), {}, 413, "The picture has more than 1 megapixels."),
        ("/detect", draw(0), {"Sec-Fetch-Site": "cross-site"}, 403, "The request comes from another site's page."),
        ("/attention", draw(0), {}, 400, "box, label and score must be those of a detection, as /detect tells them."),
        ("/attention?box=1,2,3,4&label=2&score=0.5", draw(0), {}, 400, "box, label and score must be those"),
        ("/attention?box=1,2,3,nan&label=0&score=0.5", draw(0), {}, 400, "box, label and score must be those"),
        ("/attention?box=1,2,3,4&label=0&score=0.5", b"x", {}, 415, "The file is not a JPEG"),
        ("/config.json", draw(0), {}, 404, "Not Found: /config.json."),
        ("/../../../etc/passwd", draw(0), {}, 404, "Not Found: /../../../etc/passwd."),
        ("/%2e%2e/%2e%2e/etc/passwd", draw(0), {}, 404, "Not Found: /../../etc/passwd."),
    ],
)
def test_what_is_refused_gets_a_sentence(strict, path, body, headers, status, sentence):
    found, content = ask(strict.port, body, path, **headers)
    assert found == status and content["error"].startswith(sentence) and content["error"].endswith(".")
    assert strict.service._in_hand == 0


def test_another_name_of_this_machine_leads_nowhere(strict):
    """As a foreign page would have it that gives its own name our address."""
    connection = http.client.HTTPConnection("127.0.0.1", strict.port)
    connection.request("GET", "/", headers={"Host": "example.org"})
    response = connection.getresponse()
    assert response.status == 400 and b"Try deperceiver" not in response.read()
    connection.close()
    assert own_names("0.0.0.0") == own_names("192.168.1.5") == ["*"]
    assert "localhost" in own_names("localhost") and "[::1]" in own_names("::1")


def test_too_slow(strict):
    """An upload that stops, and a detector that is busy for longer."""
    with socket.create_connection(("127.0.0.1", strict.port)) as connection:
        connection.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408 and json.loads(response.read()) == {"error": "The upload took longer than 1 s."}
    go = threading.Event()
    strict.service.queue.submit(go.wait)
    try:
        assert ask(strict.port, draw(0)) == (504, {"error": "There was no answer within 1 s."})
    finally:
        go.set()


def test_an_upload_that_ends_early_leaves_its_place(strict):
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", strict.port)) as connection:
            connection.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
    assert ask(strict.port, b"")[0] == 415


@pytest.mark.parametrize("error", [KeyError("as no decoder should"), UserError("The answers are no numbers.")])
def test_one_bad_picture_harms_no_other(app, monkeypatch, error):
    """Whatever fails but the reading of a file: of a batch, only the one to blame; the fault is the server's."""
    pictures = [encode(Image.new("RGB", (64, 64), (9 * k, 0, 0)), "PNG") for k in range(3)]
    stream = PictureDetector.stream

    def failing(self, given, **options):
        given = list(given)
        if pictures[1] in given:
            raise error
        return stream(self, given, **options)

    monkeypatch.setattr(PictureDetector, "stream", failing)
    go = threading.Event()
    app.service.queue.submit(go.wait)
    futures = [app.service.queue.detect(picture) for picture in pictures]
    go.set()
    assert len(futures[0].result()) == len(futures[2].result()) == 5
    with pytest.raises(RuntimeError):
        futures[1].result()
    status, content = ask(app.port, pictures[1])
    assert (status, content) == (500, {"error": "The server failed at this picture; its log says why."})

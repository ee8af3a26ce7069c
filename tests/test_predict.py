"""predict.py as a person runs it: files of any kind and size, pictures and detections.json, and what goes wrong."""

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, features

from deperceiver_jax import predict as program
from deperceiver_jax.prediction.predict import find_images, output_files
from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize.draw_boxes import READABLE_SIDE

SIZES = {"a.jpg": (60, 90), "b.PNG": (700, 500), "deep/c.jpeg": (33, 20), "d.bmp": (64, 64)}


def predict(*arguments):
    return run(program.main, ["predict.py", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        (folder / name).write_bytes(cv2.imencode(name[name.rindex(".") :].lower(), pixels)[1].tobytes())
    (folder / "notes.txt").write_text("not an image")
    return folder


def picture_sizes(output):
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(output)): cv2.imread(str(path)).shape[:2] for path in files}


def test_a_folder(tiny_run, photos, tmp_path):
    """Its images, not what lies deeper; tiny ones are enlarged; every detection says where it is and what."""
    output = tmp_path / "out"
    assert predict(f"--workdir={tiny_run}", f"--images={photos}", f"--output={output}", "--score_threshold=0") == 0
    shown = {"a.jpg": (341, 512), "b.PNG": (700, 500), "d.bmp": (READABLE_SIDE, READABLE_SIDE)}
    assert picture_sizes(output) == shown
    entries = json.loads((output / "detections.json").read_text())
    assert len(entries) == 5 * 3
    assert [entry["file_name"] for entry in entries[::5]] == [str(photos / name) for name in sorted(shown)]
    assert [entry["image_id"] for entry in entries[::5]] == [0, 1, 2]
    for entry in entries:
        assert set(entry) == {"image_id", "category_id", "bbox", "score", "file_name", "category_name"}
        assert (entry["category_id"], entry["category_name"]) in {(20, "white"), (30, "green")}
    widths = [max(entry["bbox"][2] for entry in entries[i : i + 5]) for i in (0, 5, 10)]
    assert widths[1] > 2 * widths[0]  # pixels of each image itself, not of the picture


def test_a_pattern(tiny_run, photos, tmp_path):
    output = tmp_path / "out"
    assert predict(f"--workdir={tiny_run}", f"--images={photos}/**/*.jp*g", f"--output={output}") == 0
    assert set(picture_sizes(output)) == {"a.jpg", "deep/c.jpeg"}


def test_the_threshold_leaves_out(tiny_run, photos, tmp_path):
    for threshold in (0, 1.1):
        arguments = [f"--images={photos}/a.jpg", f"--output={tmp_path}/{threshold}", f"--score_threshold={threshold}"]
        assert predict(f"--workdir={tiny_run}", *arguments) == 0
    plain, drawn = (cv2.imread(str(tmp_path / name / "a.jpg")) for name in ("1.1", "0"))
    assert json.loads((tmp_path / "1.1" / "detections.json").read_text()) == []
    assert np.abs(plain.astype(int) - drawn).max() > 100


def test_a_folder_of_other_kinds(tiny_run, tmp_path):
    """Everything that can be read is taken; what Pillow only recognises by name, or other files, is not."""
    (tmp_path / "photos").mkdir()
    kinds = ["gif", "webp", "jp2", "ppm", "tga", "pcx"] + ["avif"] * features.check("avif")
    for name in kinds:
        Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "photos" / f"x.{name}")
    for name in ("x.h5", "x.mpg", "x.eps", "x.txt"):
        (tmp_path / "photos" / name).write_text("no picture")
    assert predict(f"--workdir={tiny_run}", f"--images={tmp_path}/photos", f"--output={tmp_path}/out") == 0
    expected = {f"x.{name}" if name == "webp" else f"x.{name}.png" for name in kinds}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"detections.json"}


def test_names_with_letters_of_patterns(photos):
    """A file or folder by this very name comes before what the name would match as a pattern."""
    (photos / "a.jpg").rename(photos / "cup [1].jpg")
    (photos / "cup 1.jpg").write_bytes(b"another")
    (photos / "deep").rename(photos / "day [2]*")
    assert find_images(f"{photos}/cup [1].jpg") == [photos / "cup [1].jpg"]
    assert find_images(f"{photos}/day [2]*") == [photos / "day [2]*" / "c.jpeg"]
    assert find_images(f"{photos}/cup [12].jpg") == [photos / "cup 1.jpg"]


def test_every_picture_has_a_name_of_its_own():
    names = ["a.gif", "a.gif-2.png", "a.gif.png", "b.avif", "b.avif.PNG", "deep/a.gif"]
    targets = output_files([Path("photos") / name for name in names], Path("/tmp"))
    found = [str(target.relative_to("/tmp")) for target in targets]
    assert found == ["a.gif-3.png", "a.gif-2.png", "a.gif.png", "b.avif.png", "b.avif.PNG", "deep/a.gif.png"]


def test_a_phones_picture_is_drawn_upright(tiny_run, tmp_path):
    """And its boxes, which no longer fit the picture as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((600, 800, 3), 200, np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    arguments = [f"--images={tmp_path}/a.jpg", f"--output={tmp_path}/out", "--score_threshold=0"]
    assert predict(f"--workdir={tiny_run}", *arguments) == 0
    with Image.open(tmp_path / "out" / "a.jpg") as picture:
        assert picture.size == (600, 800) and picture.getexif().get(0x0112) is None


def test_a_disk_that_fills_up_is_one_sentence(tiny_run, photos, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert predict(f"--workdir={tiny_run}", f"--images={photos}/a.jpg", f"--output={tmp_path}/out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --output: {tmp_path}/out cannot be written: No space left on device."


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n and no more", b"", "half"])
def test_a_broken_image_is_named_before_anything_is_written(tiny_run, photos, tmp_path, capsys, content):
    whole = (photos / "b.PNG").read_bytes()
    (photos / "broken.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    arguments = [f"--workdir={tiny_run}", f"--images={photos}", f"--output={tmp_path}/out"]
    assert predict(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(photos / "broken.png") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--output={0}/out"], "--images is needed"),
        (["--images={0}"], "--output is needed"),
        (["--images={0}/none*", "--output={0}/out"], "--images: there is no image at {0}/none*."),
        (["--images={0}/deep", "--output={0}/deep"], "--output: {0}/deep is where the images are"),
        (["--images={0}", "--output={0}/notes.txt"], "--output: {0}/notes.txt is not a folder."),
        (
            ["--images={0}", "--output={0}/notes.txt/out"],
            "--output: {0}/notes.txt/out cannot be written: {0}/notes.txt is",
        ),
        (["--images={0}", "--output={0}/out", "--weights={0}"], "Either --workdir or --weights is needed"),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, photos, capsys, arguments, sentence):
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    assert predict(f"--workdir={tiny_run}", *(argument.format(photos) for argument in arguments)) == 1
    assert capsys.readouterr().err.startswith("error: " + sentence.format(photos))
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before

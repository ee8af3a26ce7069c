"""predict.py as a person runs it: files of any kind and size, what it writes in every format, and what goes wrong."""

import csv
import errno
import io
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, features

from deperceiver_jax import UserError, load
from deperceiver_jax import predict as program
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.prediction.detections import PictureDetections
from deperceiver_jax.prediction.files import Video, find_files, find_images, output_files
from deperceiver_jax.prediction.keeper import Keeper
from deperceiver_jax.prediction.predict import choose_slots
from deperceiver_jax.prediction.results import Looked
from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize.draw_boxes import READABLE_SIDE
from tests.shared_work import abstract_detectors_are_shared, detect_steps_are_shared  # noqa: F401

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
    for threshold in (0, 1):
        arguments = [f"--images={photos}/a.jpg", f"--output={tmp_path}/{threshold}", f"--score_threshold={threshold}"]
        assert predict(f"--workdir={tiny_run}", *arguments) == 0
    plain, drawn = (cv2.imread(str(tmp_path / name / "a.jpg")) for name in ("1", "0"))
    few, all_of_them = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("1", "0"))
    assert len(few) < len(all_of_them) == 5 and all(entry["score"] >= 1 for entry in few)
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
def test_a_broken_image_is_named_and_the_others_are_done(tiny_run, photos, tmp_path, capsys, content):
    whole = (photos / "b.PNG").read_bytes()
    (photos / "broken.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    arguments = [f"--workdir={tiny_run}", f"--images={photos}", f"--output={tmp_path}/out"]
    assert predict(*arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning", "error"))]
    assert lines[0].startswith(f"warning: {photos}/broken.png is not a whole image: it is ")
    assert lines[1:] == ["error: 1 of 4 files could not be read; the warnings say which."]
    assert set(picture_sizes(tmp_path / "out")) == {"a.jpg", "b.PNG", "d.bmp"}
    assert (tmp_path / "out" / "detections.json").is_file()


def test_every_format_says_what_python_says(tiny_run, photos, tmp_path):
    """To the bit where a format has room for it; with the data set's own image ids, without pictures."""
    images = [
        {"id": 10**12 + k, "file_name": name} for k, name in enumerate(("deep/c.jpeg", "b.PNG", "a.jpg", "x.png"))
    ]
    (tmp_path / "info.json").write_text(json.dumps({"images": images, "categories": []}))
    places = [photos / name for name in ("b.PNG", "deep/c.jpeg", "a.jpg")]
    given = [f"--images={place}" for place in places[:2]] + ["--images", places[2], places[0]]
    written = ["--format=csv,coco,yolo", f"--annotations={tmp_path}/info.json", "--nodraw", "--score_threshold=0"]
    output = tmp_path / "out"
    assert predict(f"--workdir={tiny_run}", *given, f"--output={output}", *written) == 0
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.*")) == [
        *("classes.txt", "detections.csv", "detections.json", "labels/a.txt", "labels/b.txt", "labels/deep/c.txt")
    ]
    found = load(tiny_run).predict(places, threshold=0)
    entries = json.loads((output / "detections.json").read_text())
    with open(output / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(entries) == len(rows) == 15
    for k, (place, each) in enumerate(zip(places, found, strict=True)):
        mine, lines = entries[5 * k : 5 * k + 5], rows[5 * k : 5 * k + 5]
        image_id = next(image["id"] for image in images if str(place).endswith(image["file_name"]))
        assert {entry["image_id"] for entry in mine} == {int(row["image_id"]) for row in lines} == {image_id}
        assert {entry["file_name"] for entry in mine} == {row["file_name"] for row in lines} == {str(place)}
        extents = each.boxes[:, 2:] - each.boxes[:, :2]
        np.testing.assert_array_equal(np.float32([entry["bbox"] for entry in mine])[:, :2], each.boxes[:, :2])
        np.testing.assert_array_equal(np.float32([entry["bbox"] for entry in mine])[:, 2:], extents)
        np.testing.assert_array_equal(np.float32([entry["score"] for entry in mine]), each.scores)
        edges = [[row[side] for side in ("left", "top", "right", "bottom")] for row in lines]
        np.testing.assert_array_equal(np.float32(edges), each.boxes)
        assert [row["category_name"] for row in lines] == each.names.tolist()
        height, width = each.size
        label = output / "labels" / place.relative_to(photos).with_suffix(".txt")
        numbers = np.array([line.split() for line in label.read_text().splitlines()], float)
        shares = np.clip(each.boxes / [width, height, width, height], 0, 1)
        np.testing.assert_allclose(numbers[:, 1:3] + numbers[:, 3:5] / 2, shares[:, 2:], atol=1e-5)
        np.testing.assert_allclose(numbers[:, 1:3] - numbers[:, 3:5] / 2, shares[:, :2], atol=1e-5)
        names = (output / "classes.txt").read_text().split()
        assert [names[int(number)] for number in numbers[:, 0]] == each.names.tolist()


def test_no_picture_is_overwritten(tmp_path):
    pictures = [tmp_path / "a" / "1.jpg", tmp_path / "a" / "b" / "1.jpg"]
    for picture in pictures:
        picture.parent.mkdir(exist_ok=True)
        picture.touch()
    with pytest.raises(UserError, match=f"--output: {pictures[1]} would take the place of one of the images; take"):
        output_files(pictures, tmp_path / "a" / "b")


def test_a_picture_is_one_however_it_is_called_and_goes_below_the_output(tmp_path, monkeypatch):
    """With .. in its name it would go beside the output, and might take the place of another file."""
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here, other):
        folder.mkdir()
        (folder / "a.jpg").touch()
    monkeypatch.chdir(here)
    found = find_files(["../other/a.jpg", "a.jpg", str(here / "a.jpg"), f"{other}/*.jpg", "./a.jpg"])
    assert found == [Path("../other/a.jpg"), Path("a.jpg")]
    assert output_files(found, Path("out")) == [Path("out/other/a.jpg"), Path("out/here/a.jpg")]
    (here / "same.jpg").symlink_to("a.jpg")
    assert len(find_files([str(here)])) == 2


def test_a_name_that_is_no_text(tiny_run, photos, tmp_path):
    for path in photos.iterdir():
        if path.name != "a.jpg" and path.is_file():
            path.unlink()
    (photos / "a.jpg").rename(photos / os.fsdecode(b"\xff.jpg"))
    arguments = [f"--images={photos}", f"--output={tmp_path}/out", "--score_threshold=0", "--format=coco,csv,yolo"]
    assert predict(f"--workdir={tiny_run}", *arguments) == 0
    lines = (tmp_path / "out" / "detections.csv").read_bytes().splitlines()
    assert len(lines) == 1 + 5 and lines[1].startswith(os.fsencode(photos) + b"/\xff.jpg,")


def test_a_label_file_is_called_as_its_picture(tiny_run, tmp_path):
    """Of a picture that is drawn as another kind of file, too."""
    for name in ("a.gif", "b.png", "b.bmp"):
        Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / name)
    arguments = [f"--images={tmp_path}", f"--output={tmp_path}/out", "--score_threshold=0", "--format=yolo"]
    assert predict(f"--workdir={tiny_run}", *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out/labels").iterdir()) == ["a.txt", "b.png.txt", "b.txt"]


def test_all_classes_of_a_name_are_chosen():
    classes = ClassMap.from_categories([(1, "cat"), (2, "dog"), (7, "cat"), (9, "7")])
    assert [choose_slots(names, classes) for names in (["cat"], ["2"], ["7"], [])] == [[0, 2], [1], [3], [0, 1, 2, 3]]


def test_a_video_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    """And nothing of it is left."""

    class Writer:
        fourcc = cv2.VideoWriter.fourcc

        def __init__(self, path, *_):
            Path(path).touch()

        def isOpened(self):  # noqa: N802
            return False

    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    keeper = Keeper(tmp_path, [], ClassMap.from_categories([(1, "cat")]), draw=True, crops=False)
    none = np.zeros(0, np.int64)
    found = PictureDetections(np.zeros((0, 4), np.float32), none, none, none.astype(str), none, (48, 1))
    with pytest.raises(
        UserError, match="x.mp4 cannot be written: OpenCV makes no MP4 of [0-9]+ x 512 pixels at 25 frames"
    ):
        with keeper.video(Path("x.mp4"), 25.0, as_frames=False) as keep:
            keep(Looked(Path("x.avi"), Path("x.mp4"), 0, found, 0), np.zeros((48, 1, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most", "rate"), [(5, 25.0), (10, 10.0)])
def test_a_rate_that_is_none(tmp_path, monkeypatch, most, rate):
    write_video(tmp_path / "x.avi", 1)
    monkeypatch.setattr("deperceiver_jax.prediction.files.MOST_FRAMES", most)
    assert Video(tmp_path / "x.avi").frames_per_second == rate


def test_chosen_classes_and_crops(tiny_run, photos, tmp_path):
    arguments = [f"--images={photos}", f"--output={tmp_path}/out", "--score_threshold=0", "--save_crops"]
    assert predict(f"--workdir={tiny_run}", *arguments, "--classes=white") == 0
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert 0 < len(entries) < 15 and {entry["category_name"] for entry in entries} == {"white"}
    crops = list((tmp_path / "out" / "crops").rglob("*.jpg"))
    assert 0 < len(crops) <= len(entries) and {path.parent.name for path in crops} == {"white"}
    first = next(entry for entry in entries if entry["file_name"].endswith("b.PNG"))
    left, top, width, height = first["bbox"]
    edges = np.clip([top, left, top + height, left + width], 0, [700, 500] * 2)
    size = np.ceil(edges[2:]) - np.floor(edges[:2])
    assert cv2.imread(str(tmp_path / "out/crops/white/b.PNG-0.jpg")).shape[:2] == tuple(size)


def write_video(path, frames, size=(48, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size[::-1])
    for k in range(frames):
        writer.write(np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8))
    writer.release()


def test_a_video_and_a_list_on_standard_input(tiny_run, photos, tmp_path, monkeypatch):
    """The frames are numbered after the pictures; the drawn video has all of them, at the same rate."""
    write_video(tmp_path / "clip.avi", 19)
    names = f"{photos}/a.jpg\n\n{tmp_path}/clip.avi\n".encode()
    for frames in (False, True):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names)))
        output = tmp_path / f"out{frames}"
        arguments = ["--images=-", f"--output={output}", "--score_threshold=0", f"--frames={frames}"]
        assert predict(f"--workdir={tiny_run}", *arguments) == 0
        entries = json.loads((output / "detections.json").read_text())
        assert [(entry["image_id"], entry.get("frame")) for entry in entries[::5]] == [
            (0, None),
            *((2 + k, k) for k in range(19)),
        ]
    drawn = cv2.VideoCapture(str(tmp_path / "outFalse" / "clip.avi.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 19 and drawn.get(cv2.CAP_PROP_FPS) == 10
    assert drawn.read()[1].shape == (384, 512, 3)
    assert len(list((tmp_path / "outTrue" / "clip.avi.mp4.frames").iterdir())) == 19


def test_ctrl_c_keeps_what_is_done(tiny_run, photos, tmp_path, capsys, monkeypatch):
    from deperceiver_jax.prediction.keeper import Keeper

    done, picture = [], Keeper.picture

    def interrupted(keeper, looked):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(looked.file)
        picture(keeper, looked)

    monkeypatch.setattr(Keeper, "picture", interrupted)
    arguments = [f"--images={photos}", f"--output={tmp_path}/out", "--score_threshold=0"]
    assert predict(f"--workdir={tiny_run}", *arguments) == 1
    out, err = capsys.readouterr()
    assert "Wrote 2 of 3 files with 10 detections" in out
    assert err.splitlines()[-1] == f"error: Stopped by Ctrl-C: {tmp_path}/out has what was found until then."
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["file_name"] for entry in entries} == set(map(str, done))
    assert set(picture_sizes(tmp_path / "out")) == {path.name for path in done}


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
        (["--images={0}", "--output={0}/out", "--weights={0}"], "--workdir and --weights are both given"),
        (
            ["--images={0}", "--output={0}/out", "--classes=whit"],
            "--classes: the detector knows no class 'whit'; the",
        ),
        (
            ["--images={0}", "--output={0}/out", "--score_threshold=50"],
            "--score_threshold is 50.0; it must be between 0",
        ),
        (["--images={0}", "--output={0}/out", "--format=voc"], "--format is 'voc'; it can be coco, csv or yolo."),
        (
            ["--images={0}", "--output={0}/out", "--annotations={0}/notes.txt"],
            "--annotations: {0}/notes.txt is not",
        ),
        (
            ["--images={0}", "--output={0}/out", "--annotations={0}/none.json"],
            "--annotations: {0}/none.json cannot",
        ),
        (
            ["--images={0}", "--output={0}/out", "--annotations={0}/few.json"],
            "--annotations: {0}/few.json does not",
        ),
        (["--images=-", "--output={0}/out"], "--images=-: standard input is closed; give it one path a line."),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, photos, capsys, monkeypatch, arguments, sentence):
    (photos / "few.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}]}))
    monkeypatch.setattr("sys.stdin", None)
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    assert predict(f"--workdir={tiny_run}", *(argument.format(photos) for argument in arguments)) == 1
    assert capsys.readouterr().err.startswith("error: " + sentence.format(photos))
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before


def test_an_empty_list_and_a_video_that_is_none(tiny_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert predict(f"--workdir={tiny_run}", "--images=-", f"--output={tmp_path}/out") == 1
    assert capfd.readouterr().err == "error: --images=-: standard input names no image; give it one path a line.\n"
    (tmp_path / "clip.mp4").write_text("no video")
    assert predict(f"--workdir={tiny_run}", f"--images={tmp_path}/clip.mp4", f"--output={tmp_path}/out") == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"warning: {tmp_path}/clip.mp4 is not a video that OpenCV can read.",
        "error: 1 of 1 files could not be read; the warnings say which.",
    ]

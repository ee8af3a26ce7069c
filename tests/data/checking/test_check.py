"""`deperceiver data check`: what it says of folders with known faults, and its status."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from configs.base import base
from deperceiver_jax.data.__main__ import main
from deperceiver_jax.data.batches.loader import _TrainingStep
from deperceiver_jax.data.checking.check import check_directory
from deperceiver_jax.data.checking.duplicates import same_content
from deperceiver_jax.data.checking.suggestions import images_per_second, suggest_buckets, suggest_scale
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.program.command_line import run

CONFIG = "--config=configs/demo.py:deperceiver_plus"


@pytest.fixture
def folder(coco_folder):
    """Five pictures for training and two for validation, with boxes of two classes."""
    sizes = {id: (60, 80) for id in range(1, 6)}
    boxes = [coco_folder.annotation(id, id, [4, 5, 10 + id, 12], category_id=(1, 5)[id % 2]) for id in sizes]
    coco_folder.write(boxes, sizes=sizes)
    coco_folder.write(
        [coco_folder.annotation(1, 1, [4, 5, 20, 12])], split="validation", sizes={1: (60, 80), 9: (50, 70)}
    )
    file = coco_folder.image_file("1.jpg", "validation")  # not that of training, of the same name and seed
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(file)
    return coco_folder


@pytest.fixture
def check(folder, tmp_path, capsys):
    """Runs the command; gives (status, what it prints, its errors)."""

    def of(*arguments):
        sheet = tmp_path / "sheet.png"
        fields = ["--config.data.name=coco_directory", "--config.data.batch_size=2"]
        fields += [f"--config.data.prepared_directory={folder.prepared}", f"--sheet={sheet}"]
        status = run(main, ["data", "check", str(folder.root), CONFIG, *fields, *arguments])
        return status, *capsys.readouterr()

    return of


def _row(text, label):
    return next(line.removeprefix(label).split() for line in text.splitlines() if line.startswith(label))


def test_a_good_folder_passes_and_is_described(folder, check, tmp_path):
    status, text, errors = check()
    assert (status, errors) == (0, "")
    assert text.startswith(f"{folder.root} is in COCO's layout")
    assert _row(text, "pictures") == ["5", "2"] and _row(text, "  without a box to learn") == ["0", "1"]
    assert _row(text, "boxes to learn") == ["5", "1"] and _row(text, "  of the fullest picture") == ["1", "1"]
    assert _row(text, "cat") == ["2,", "2", "1,", "1"] and _row(text, "dog") == ["3,", "3", "0,", "0"]
    assert _row(text, "  width x height, smallest") == ["80", "x", "60", "70", "x", "50"]
    assert "Nothing here would stop a run." in text
    assert text.partition("Worth a look\n")[2].startswith("- 2 classes have fewer than 10 boxes in train.\n\n")
    assert "clipped" not in text  # what nothing has is not listed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * sheet.height / 2 > 0  # two rows, of two and three pictures
    assert folder.leftovers() == []


def test_tiffs_are_read(folder, check):
    for split in ("train", "val"):
        for file in (folder.root / f"{split}2017").glob("*.jpg"):
            with Image.open(file) as picture:
                picture.save(file.with_suffix(".tif"))
            file.unlink()
        file = folder.root / "annotations" / f"instances_{split}2017.json"
        file.write_text(file.read_text().replace(".jpg", ".tif"))
    status, text, errors = check()
    assert (status, errors) == (0, "") and _row(text, "pictures") == ["5", "2"]


def test_corners_instead_of_sizes_and_categories_of_one_name(folder, check):
    def change(content):
        for category in content["categories"]:
            category["name"] = "cup"

    sizes = {id: (60, 80) for id in range(1, 6)}
    boxes = [folder.annotation(id, id, [40, 35, 70 + id, 55], category_id=(1, 5)[id % 2]) for id in sizes]
    folder.write(boxes, sizes=sizes, change=change)
    folder.write([folder.annotation(1, 7, [4, 5, 20, 12])], split="validation", change=change)
    status, text, _ = check()
    assert status == 0 and "- train: 5 boxes reach over the border: are they left, top, right and bottom? They" in text
    assert _row(text, "cup (1)")[:2] == ["2,", "2"] and _row(text, "cup (5)")[:2] == ["3,", "3"]
    assert "- 2 categories are called 'cup'." in text


def test_what_is_odd_is_counted(folder, check):
    def change(content):
        content["images"][0]["width"] = 99
        boxes = content["annotations"]
        boxes += [boxes[0] | {"id": 11}, boxes[1] | {"id": 12, "bbox": [70, 5, 40, 12]}]
        boxes += [boxes[1] | {"id": 13, "bbox": [90, 5, 4, 4]}, boxes[1] | {"id": 14, "bbox": [9, 5, 0.5, 0.5]}]
        boxes += [boxes[1] | {"id": 15, "iscrowd": 1}]

    sizes = {id: (60, 80) for id in range(1, 6)}
    boxes = [folder.annotation(id, id, [4, 5, 10, 12]) for id in sizes]
    images = {"2.jpg": folder.image_file("3.jpg").read_bytes(), "spare.jpg": b"", "Thumbs.db": b"x"}
    images["4.jpg"] = folder.image_file("9.jpg", "validation").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 3
    folder.write(boxes, sizes=sizes, images=images, change=change)
    Image.new("RGB", (80, 60)).save(folder.image_file("5.jpg"), "PNG", exif=exif)
    status, text, _ = check()
    assert status == 0
    for label, counts in {
        "pictures": ["5", "2"],
        "  of the same content as another of the split": ["1", "0"],
        "  turned, as EXIF says": ["1", "0"],
        "  of another size than annotated": ["2", "0"],
        "  of another kind than their name says": ["1", "0"],
        "crowds, left out of training": ["1", "0"],
        "boxes clipped at the border": ["1", "0"],
        "boxes empty inside the picture, left out": ["1", "0"],
        "boxes smaller than a pixel": ["1", "0"],
        "boxes that are there twice": ["1", "0"],
    }.items():
        assert _row(text, label) == counts, label
    for words in (
        "- 2.jpg = 3.jpg have the same content.",
        "- 1 pictures are in several splits, so that metrics flatter; the first is train 4.jpg = validation 9.jpg.",
        f"- 1 pictures are listed nowhere; the first is {folder.image_file('spare.jpg')}.",
        f"- 1 other files are among them; the first is {folder.image_file('Thumbs.db')}.",
        "- 1 classes have no box in train; the first is 'dog'.",
        "- train: 1 images have an EXIF orientation of which their annotated size does not tell",
    ):
        assert words in text


def _remove(folder):
    folder.image_file("4.jpg").rename(folder.image_file("4.JPG"))


def _cut(folder):
    file = folder.image_file("4.jpg")
    file.write_bytes(file.read_bytes()[:-50])


def _without_boxes(folder):
    folder.write([], sizes={1: (60, 80), 2: (60, 80)})


def _normalised(folder):
    folder.write([folder.annotation(1, 1, [0.1, 0.1, 0.5, 0.5])], sizes={1: (60, 80), 2: (60, 80)})


def _unlisted_class(folder):
    folder.write([folder.annotation(1, 1, [1, 1, 5, 5], 7)], sizes={1: (60, 80), 2: (60, 80)})


def _other_classes(folder):
    file = folder.annotation_file("validation")
    file.write_text(file.read_text().replace("dog", "wolf"))


def _no_validation(folder):
    folder.annotation_file("validation").unlink()


def _unannotated_validation(folder):
    file = folder.annotation_file("validation")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_remove, "1 of the 5 images of split train cannot be used, the first is 4.jpg (there is 4.JPG, which differs"),
        (_cut, "1 of the 5 images of split train cannot be used, the first is 4.jpg: it is a truncated JPEG"),
        (_without_boxes, "split train, has a box to learn"),
        (_normalised, "all 1 boxes are smaller than a pixel; they look normalised"),
        (_unlisted_class, "annotation 1 has category 7, which the file does not list."),
        (_other_classes, "The classes of train and validation differ"),
        (_no_validation, "has no split validation"),
        (_unannotated_validation, "has no annotations to evaluate with."),
    ],
)
def test_what_would_stop_a_run_is_said_with_status_1(folder, check, break_it, words):
    """Everything else is described all the same; and a run does stop with most of these sentences."""
    break_it(folder)
    status, text, errors = check()
    assert status == 1
    assert words in text.partition("A run would stop with")[2] and "a run would stop: " in errors
    assert "boxes to learn" in text


def test_decoding_finds_what_headers_do_not(folder, check):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    file = folder.image_file("4.jpg")
    Image.fromarray(pixels).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[1000:1100] = bytes(100)  # of the pixels
    file.write_bytes(content)
    assert check_directory(folder.config(batch_size=2), decode=False).problems == []
    status, text, _ = check("--decode")
    assert status == 1 and "the first is 4.jpg: it cannot be decoded" in text
    status, text, _ = check()  # which meets it when it draws the sheet
    assert status == 1 and "Image 4.jpg is corrupt" in text.partition("A run would stop with")[2]
    assert check("--decode", "--config.data.skip_corrupt=True")[0] == 0


def test_what_it_is_told_wrongly(folder, check, tmp_path, capsys):
    for arguments, words in {
        ("check",): "check needs one folder",
        ("check", str(folder.root), "more"): "check needs one folder",
        ("look",): "does two things: check DIR and prepare DIR",
        ("check", str(tmp_path / "none")): "There is no directory",
        ("check", str(folder.root), f"--sheet={folder.annotation_file()}/x.png"): "is not a folder.",
        (
            "check",
            str(folder.root),
            "--sheet",
            str(tmp_path / "a.tif"),
        ): "a.tif must end in .png or",
        ("check", str(folder.root), "--config=demo"): "config.data.name is 'shapes'; check looks at folders, which are",
        ("prepare", str(folder.root), "--config=demo"): "'shapes'; prepare looks at folders, which are coco_direc",
    }.items():
        assert run(main, ["data", *arguments]) == 1
        assert words in capsys.readouterr().err
    shutil.rmtree(folder.root / "annotations")
    status, _, errors = check()
    assert status == 1 and "has no layout that is known" in errors


def test_it_knows_what_the_loader_knows(folder):
    """Sizes, ids and boxes of an unprepared split are those of the prepared one."""
    data = folder.config(layout="coco", batch_size=2)
    checked = check_directory(data, decode=False)
    assert checked.problems == []
    for split in ("train", "validation"):
        found, expected = checked.splits[split].source, open_source(data, split)
        np.testing.assert_array_equal(found.sizes, expected.sizes)
        np.testing.assert_array_equal(found.image_ids, expected.image_ids)
        assert found.classes == expected.classes
        for k in range(len(found)):
            assert found.image_bytes(k) == expected.image_bytes(k) and found.filename(k) == expected.filename(k)
            for mine, others in zip(found.targets(k), expected.targets(k), strict=True):
                np.testing.assert_array_equal(mine, others)


def test_files_of_one_content(tmp_path):
    """Of the same size, they differ at the start, in the middle, or nowhere."""
    content = bytearray(b"0123456789" * 5000)
    for name, place in {"a": None, "b": 0, "c": 25_000, "d": None, "e": 49_999}.items():
        changed = bytearray(content)
        if place is not None:
            changed[place] = ord("x")
        (tmp_path / name).write_bytes(changed)
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "g").write_bytes(b"")
    groups = same_content(str(tmp_path / name) for name in "abcdefga")
    assert [[path[-1] for path in group] for group in groups] == [["a", "d"], ["f", "g"]]


def test_the_rate_of_loading_is_of_loading(folder, monkeypatch):
    """And not of a queue that was filled before: what takes 20 ms comes from 4 threads 200 times a second at most."""
    data = base().data.copy_and_resolve_references()
    data.directory = str(folder.root)
    train = check_directory(data, decode=False).splits["train"]

    make = _TrainingStep.__call__

    def slow(step, *arguments):
        time.sleep(0.02)
        return make(step, *arguments)

    monkeypatch.setattr(_TrainingStep, "__call__", slow)
    assert images_per_second(train, data) < 300


def test_suggestions_follow_from_the_boxes(folder):
    """Boxes of 8 pixels in pictures of 60: DETR's sizes times (26 / 8 * 60) / 800, within bounds."""
    sizes = {id: (600, 800) for id in range(1, 4)}
    folder.write([folder.annotation(id, id, [40, 50, 24, 24]) for id in sizes], sizes=sizes)
    data = base().data.copy_and_resolve_references()
    data.directory, data.batch_size = str(folder.root), 2
    train = check_directory(data, decode=False).splits["train"]
    scale = suggest_scale(train, data)
    assert scale.fields["eval_scale"] == 672  # 600 * 26 / 24 = 650, on a grid of 32
    assert scale.fields["scales"] == (416, 448, 480, 512, 544, 576, 608, 640, 672)
    assert scale.fields["max_size"] == round(1333 * 672 / 800)
    data.update(scale.fields)
    assert suggest_scale(train, data).fields == {}
    data.eval_scale, data.scales = 640, (640,)  # near enough
    assert suggest_scale(train, data).fields == {}
    data.scales, data.crop_probability, data.buckets = (640,), 0.0, 8
    assert suggest_buckets(train, data).fields == {"buckets": 1}  # all pictures come out in one size

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data.datasets.directory_builder import directory_config
from deperceiver_jax.data.datasets.layouts.recognise import find_split
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data" / "coco_tiny"


def _name(coco_folder, split="train", skip_corrupt=False):
    folder = coco_folder.image_file("", split)
    for image in folder.iterdir():
        os.utime(image, (1, 1))  # as if it had never been written again
    return directory_config(find_split(coco_folder.root, coco_folder.config(), split), split, skip_corrupt).name


def _refusal(coco_folder, **fields):
    with pytest.raises(UserError) as refusal:
        open_source(coco_folder.config(**fields), "train")
    assert coco_folder.leftovers() == []
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_images_are_stored_as_their_files_are(coco_folder):
    coco_folder.write()
    source = open_source(coco_folder.config(), "train")
    assert [source.image_bytes(k) for k in range(2)] == [
        coco_folder.image_file(name).read_bytes() for name in ("3.jpg", "7.jpg")
    ]
    assert [source.filename(k) for k in range(2)] == ["3.jpg", "7.jpg"]


def test_a_data_set_is_prepared_once(coco_folder, capsys):
    coco_folder.write()
    open_source(coco_folder.config(), "train")
    assert "Preparing split train of" in capsys.readouterr().err
    before = coco_folder.leftovers()
    assert len(open_source(coco_folder.config(), "train")) == 2
    assert capsys.readouterr().err == ""
    assert coco_folder.leftovers() == before


def test_what_is_superseded_is_named_with_its_size(coco_folder, capsys):
    """It is not deleted: another run may be reading it."""
    coco_folder.write(split="validation")
    open_source(coco_folder.config(), "validation")
    coco_folder.write()
    open_source(coco_folder.config(), "train")
    assert "before its files or fields changed" not in capsys.readouterr().err
    (before,) = (path.parent for path in coco_folder.prepared.rglob("dataset_info.json") if "train-" in str(path))
    size = sum(file.stat().st_size for file in before.iterdir()) / 1e6
    coco_folder.image_file("7.jpg").write_bytes(coco_folder.image_file("7.jpg").read_bytes() + b"x")
    open_source(coco_folder.config(), "train")
    expected = f"changed takes {size:.1f} MB in {before}; delete it when no run reads it any more."
    assert expected in capsys.readouterr().err
    assert before.is_dir()


def test_other_files_are_another_data_set(coco_folder, tmp_path):
    box = coco_folder.annotation(1, 3, [1, 2, 3, 4])
    coco_folder.write([box])
    first = _name(coco_folder)
    assert _name(coco_folder) == first
    assert _name(coco_folder, skip_corrupt=True) != first
    coco_folder.write([box | {"bbox": [1, 2, 3, 5]}])
    changed = _name(coco_folder)
    assert changed != first
    coco_folder.write([box])
    assert _name(coco_folder) == first
    moved = coco_folder.root.rename(tmp_path / "moved")
    coco_folder.root = moved
    assert _name(coco_folder) != first


def test_a_changed_annotation_file_is_prepared_anew(coco_folder):
    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3, 4])])
    assert open_source(coco_folder.config(), "train").annotations(0).boxes.tolist() == [[1, 2, 3, 4]]
    coco_folder.write([coco_folder.annotation(1, 3, [9, 2, 3, 4])])
    assert open_source(coco_folder.config(), "train").annotations(0).boxes.tolist() == [[9, 2, 3, 4]]


def test_changed_pictures_are_prepared_anew(coco_folder):
    """Of another size on the disk, or of the same but written later; one that is deleted is missed."""
    coco_folder.write(sizes={3: (30, 50), 7: (40, 60)})
    file = coco_folder.image_file("7.jpg")
    assert open_source(coco_folder.config(), "train").image_bytes(1) == file.read_bytes()
    file.write_bytes(coco_folder.image_file("3.jpg").read_bytes())
    source = open_source(coco_folder.config(), "train")
    assert (source.image_bytes(1), source.sizes.tolist()) == (file.read_bytes(), [[30, 50], [30, 50]])
    other = file.read_bytes()[:-3] + b"?" + file.read_bytes()[-2:]
    file.write_bytes(other)
    os.utime(file, (1, 1))
    assert open_source(coco_folder.config(), "train").image_bytes(1) == other
    file.unlink()
    with pytest.raises(UserError, match="1 of the 2 images that .* the first is 7.jpg"):
        open_source(coco_folder.config(), "train")


@pytest.mark.parametrize("deleted", ["metadata.json", "dataset_info.json", "features.json", "*array_record*", "*"])
def test_what_a_purger_deleted_is_prepared_anew(coco_folder, capsys, deleted):
    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3, 4])])
    open_source(coco_folder.config(), "train")
    prepared = next(coco_folder.prepared.rglob("dataset_info.json")).parent
    for file in prepared.glob(deleted):
        file.unlink()
    capsys.readouterr()
    assert len(open_source(coco_folder.config(), "train").targets(0)[0]) == 1
    assert f"{prepared} is not whole: " in capsys.readouterr().err
    assert len(open_source(coco_folder.config(), "train")) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [0, 3000, 65536, 131071])
def test_records_that_were_cut_are_prepared_anew(coco_folder, capsys, size):
    """With and without an index that still speaks of all of them."""
    coco_folder.write()
    whole = open_source(coco_folder.config(), "train").image_bytes(1)
    shard = next(coco_folder.prepared.rglob("*array_record*"))
    os.truncate(shard, size)
    assert open_source(coco_folder.config(), "train").image_bytes(1) == whole
    assert f"{shard.name} is cut" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_description_that_was_overwritten_is_prepared_anew(coco_folder, content):
    coco_folder.write()
    for name in ("metadata.json", "dataset_info.json", "features.json"):
        open_source(coco_folder.config(), "train")
        next(coco_folder.prepared.rglob(name)).write_text(content)
        assert len(open_source(coco_folder.config(), "train")) == 2


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(coco_folder, monkeypatch):
    coco_folder.write()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "it takes 0.0 MB, and 0.0 MB are free; config.data.prepared_directory can be another" in _refusal(
        coco_folder
    )


@pytest.mark.timeout(120)
def test_a_disk_that_becomes_full_is_told(coco_folder):
    """A limit on the size of files stands for the end of the disk."""
    coco_folder.write()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    process = _start(coco_folder, limit + "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, -1))\n")
    _, errors = process.communicate(timeout=60)
    sentence = (
        "UserError: Cannot prepare split train of .*: File too large; config.data.prepared_directory can be another"
    )
    assert re.search(sentence, errors), errors
    assert coco_folder.leftovers() == []


def test_one_split_is_enough_for_itself(coco_folder):
    coco_folder.write(split="validation")
    assert len(open_source(coco_folder.config(), "validation")) == 2
    with pytest.raises(
        UserError, match="coco has no split train: it was read in COCO's layout .*it has validation; conf"
    ):
        open_source(coco_folder.config(), "train")
    named = coco_folder.config(train_annotations="annotations/mine.json")
    with pytest.raises(
        UserError, match=r"Split train needs .*/mine.json \(config.data.train_annotations\), which is not"
    ):
        open_source(named, "train")
    coco_folder.write()
    with pytest.raises(
        UserError, match=r"Split train needs .*/photos \(config.data.train_images\), which is not there"
    ):
        open_source(coco_folder.config(train_images="photos"), "train")


def test_names_of_files_are_settings(coco_folder):
    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3, 4])])
    (coco_folder.root / "photos").mkdir()
    coco_folder.image_file("").rename(coco_folder.root / "photos" / "all")
    coco_folder.annotation_file().rename(coco_folder.root / "boxes.json")
    config = coco_folder.config(train_annotations="boxes.json", train_images="photos/all")
    assert len(open_source(config, "train").targets(0)[0]) == 1


def test_a_missing_image_is_named(coco_folder):
    coco_folder.write()
    coco_folder.image_file("7.jpg").unlink()
    assert "1 of the 2 images that" in _refusal(coco_folder)
    assert "the first is 7.jpg" in _refusal(coco_folder)


@pytest.mark.parametrize(
    "listed, stored, difference",
    [
        ("Photo 1.JPG", "photo 1.jpg", "upper and lower case"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "the Unicode form of its letters"),
        ("day 1\\a.jpg", "day 1/a.jpg", "its slashes"),
        ("train2017/a.jpg", "a.jpg", "its folder"),
        ("C:\\photos\\A.jpg", "a.jpg", "its spelling"),
    ],
)
def test_a_name_that_is_nearly_there_is_named(coco_folder, listed, stored, difference):
    def change(content):
        content["images"][0]["file_name"] = listed

    coco_folder.image_file(stored).parent.mkdir(parents=True)
    coco_folder.write(images={stored: b"x"}, change=change)
    expected = f"the first is {listed} (there is {stored}, which differs in {difference}); config.data.skip_corrupt"
    assert expected in _refusal(coco_folder)


def test_a_name_that_no_file_can_have(coco_folder):
    def change(content):
        content["images"][0]["file_name"] = "a\0b.jpg"

    coco_folder.write(change=change)
    assert "a\0b.jpg" in _refusal(coco_folder)
    assert len(open_source(coco_folder.config(skip_corrupt=True), "train")) == 1


def test_a_bomb_is_named_or_passed_over(coco_folder, monkeypatch):
    """A small picture under a smaller limit stands for one that would take gigabytes."""
    coco_folder.write(images={"7.jpg": cv2.imencode(".png", np.zeros((60, 50), np.uint8))[1].tobytes()})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "7.jpg (id 7): its pixels are more than the" in _refusal(coco_folder)
    assert open_source(coco_folder.config(skip_corrupt=True), "train").image_ids.tolist() == [3]


@pytest.mark.parametrize("reader", ["read_bytes", "is_file"])
def test_files_that_others_may_not_read_are_named(coco_folder, monkeypatch, reader):
    """An annotation file without the right to read it, and a folder without the right to enter it."""
    coco_folder.write()

    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, reader, denied)
    assert "instances_train2017.json cannot be read: Permission denied." in _refusal(coco_folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", "truncated"])
def test_a_corrupt_image_is_named(coco_folder, content):
    coco_folder.write()
    file = coco_folder.image_file("7.jpg")
    file.write_bytes(file.read_bytes()[:-200] if content == "truncated" else content)
    sentence = _refusal(coco_folder)
    assert str(file) in sentence and "(id 7)" in sentence


def test_an_image_that_cannot_be_opened_is_named(coco_folder):
    coco_folder.write()
    coco_folder.image_file("7.jpg").unlink()
    coco_folder.image_file("7.jpg").mkdir()
    assert "7.jpg (id 7): it cannot be read (Is a directory)" in _refusal(coco_folder)


def test_corrupt_images_are_passed_over_on_demand_and_counted(coco_folder, caplog):
    sizes = {id: (30, 40) for id in range(1, 6)}
    coco_folder.write([coco_folder.annotation(id, id, [1, 2, 3, 4]) for id in sizes], sizes=sizes)
    coco_folder.image_file("2.jpg").write_bytes(b"nonsense")
    coco_folder.image_file("4.jpg").unlink()
    source = open_source(coco_folder.config(skip_corrupt=True), "train")
    assert source.image_ids.tolist() == [1, 3, 5]
    assert source.annotations(1).id.tolist() == [3]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "2 images are missing or corrupt and are left out (the first is 2.jpg)" in warnings[0]


def test_a_folder_without_one_readable_image_is_refused(coco_folder):
    coco_folder.write(images={"3.jpg": b"", "7.jpg": b"x"})
    assert "None of the 2 images" in _refusal(coco_folder, skip_corrupt=True)


def test_images_of_another_size_than_annotated_are_counted(coco_folder, caplog):
    def change(content):
        content["images"][0]["width"] = 61

    coco_folder.write(change=change)
    source = open_source(coco_folder.config(), "train")
    assert source.sizes.tolist() == [[30, 50], [40, 60]]
    assert "1 images have another size than annotated (the first is 7.jpg)" in caplog.text


def test_a_wrong_annotation_file_leaves_nothing_behind(coco_folder):
    coco_folder.write([coco_folder.annotation(1, 99, [1, 2, 3, 4])])
    assert "annotation 1 is of image 99" in _refusal(coco_folder)
    coco_folder.annotation_file().write_text('{"images": ')
    assert "not valid JSON" in _refusal(coco_folder)


def test_a_place_that_cannot_be_written_is_named(coco_folder):
    coco_folder.write()
    coco_folder.prepared.write_text("a file")
    with pytest.raises(UserError, match=r"Cannot prepare split train of .*File exists"):
        open_source(coco_folder.config(), "train")


def _start(coco_folder, first=""):
    code = first + (
        "import sys; from configs.base import base; from deperceiver_jax.data.datasets.source import open_source\n"
        "data = base().data; data.directory, data.prepared_directory = sys.argv[1:]\n"
        "print(len(open_source(data, 'train')))"
    )
    arguments = [sys.executable, "-c", code, str(coco_folder.root), str(coco_folder.prepared)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for_line(stream, words):
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never printed")


@pytest.mark.timeout(120)
def test_a_killed_preparation_leaves_nothing_that_looks_finished(coco_folder):
    """One process is killed while it reads an image; another, which has waited for it, prepares everything."""
    coco_folder.write()
    image = coco_folder.image_file("7.jpg")
    content = image.read_bytes()
    image.unlink()
    os.mkfifo(image)  # the first process stops here until it dies
    first = _start(coco_folder)
    _wait_for_line(first.stderr, "Preparing split train")
    while not list(coco_folder.prepared.rglob("incomplete.*")):
        time.sleep(0.01)
    second = _start(coco_folder)
    _wait_for_line(second.stderr, "Waiting for another process")
    image.unlink()
    image.write_bytes(content)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    output, errors = second.communicate(timeout=60)
    assert (second.returncode, output) == (0, "2\n"), errors
    assert not list(coco_folder.prepared.rglob("incomplete.*"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs coco_tiny beside the repository")
def test_a_real_subset_of_coco(tmp_path):
    from configs.base import base

    config = base().data
    config.directory, config.prepared_directory = str(SHARED), str(tmp_path)
    source = open_source(config, "validation")
    assert len(source) == 80 and source.classes.num_slots == 91
    annotations = [source.annotations(k) for k in range(80)]
    assert sum(len(image.id) for image in annotations) == 815
    crowds = sum(int(image.is_crowd.sum()) for image in annotations)
    assert sum(len(source.targets(k)[0]) for k in range(80)) == 815 - crowds == 804
    assert np.all(np.diff(source.image_ids) > 0)

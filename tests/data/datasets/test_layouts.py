"""One data set in every layout, partly written by hotcoco, is read to the same pictures, boxes and classes."""

import json
import os
import shutil
from pathlib import Path

import hotcoco
import numpy as np
import pytest
import yaml
from PIL import Image

from configs.base import base
from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.datasets.layouts.layout import split_share
from deperceiver_jax.data.datasets.layouts.recognise import LAYOUTS
from deperceiver_jax.data.datasets.source import Source, open_source
from deperceiver_jax.errors import UserError

NAMES = {4: "dog", 7: "cat", 9: "traffic light"}
SPLITS = {"train": ("train", 6), "validation": ("val", 4)}
ROBOFLOW = {"train": "train", "validation": "valid"}


class DataSet:
    """Pictures of 2 splits with whole boxes of 3 classes; the last picture of each has none. `write` gives a layout."""

    def __init__(self, root: Path):
        self.root, self.prepared = root, root.parent / "prepared"
        draw = np.random.default_rng(0)
        self.coco, self.pixels = {}, {}
        for split, (word, count) in SPLITS.items():
            images, boxes = [], []
            for k in range(count):
                name, height, width = f"{word}_{k}.png", int(draw.integers(40, 60)), int(draw.integers(50, 90))
                self.pixels[name] = draw.integers(0, 256, (height, width, 3), np.uint8)
                images.append({"id": 10 * k + 3, "file_name": name, "height": height, "width": width})
                for _ in range(k % 3 if k < count - 1 else 0):
                    left, top = int(draw.integers(0, width - 20)), int(draw.integers(0, height - 20))
                    box = [left, top, int(draw.integers(2, 20)), int(draw.integers(2, 20))]
                    category = list(NAMES)[len(boxes) % 3]
                    boxes.append({"id": len(boxes) + 1, "image_id": 10 * k + 3, "category_id": category, "bbox": box})
            boxes = [box | {"area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0} for box in boxes]
            categories = [{"id": id, "name": name, "supercategory": "things"} for id, name in NAMES.items()]
            self.coco[split] = {"images": images, "annotations": boxes, "categories": categories}

    def pictures(self, split, folder):
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for image in self.coco[split]["images"]:
            Image.fromarray(self.pixels[image["file_name"]]).save(self.root / folder / image["file_name"])

    def text(self, name, content):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8-sig")

    def write(self, layout):
        getattr(self, f"_{layout}")()
        return self

    def config(self, **fields):
        data = base().data
        data.directory, data.prepared_directory = str(self.root), str(self.prepared)
        data.update(fields)
        return data

    def open(self, split, **fields) -> Source:
        return open_source(self.config(**fields), split)

    def refusal(self, split="train", **fields):
        with pytest.raises(UserError) as refusal:
            self.open(split, **fields)
        assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
        return str(refusal.value)

    def _coco(self):
        for split, (word, _) in SPLITS.items():
            self.pictures(split, f"{word}2017")
            self.text(f"annotations/instances_{word}2017.json", self.coco[split])
            self.text(f"annotations/captions_{word}2017.json", self.coco[split])

    def _short(self):
        for split, (word, _) in SPLITS.items():
            self.pictures(split, word)
            self.text(f"{word}.json", self.coco[split])

    def _roboflow(self):
        parent = {"id": 0, "name": "things", "supercategory": "none"}
        for split, folder in ROBOFLOW.items():
            self.pictures(split, folder)
            content = self.coco[split]
            content = content | {"categories": [parent, *content["categories"]]}
            self.text(f"{folder}/_annotations.coco.json", content)

    def _one_file(self):
        images, boxes = [], []
        for split, shift in (("train", 0), ("validation", 1000)):
            self.pictures(split, "images")
            content = self.coco[split]
            images += [image | {"id": image["id"] + shift} for image in content["images"]]
            boxes += [
                box | {"id": box["id"] + shift, "image_id": box["image_id"] + shift} for box in content["annotations"]
            ]
        self.text("result.json", self.coco["train"] | {"images": images, "annotations": boxes})

    def _yolo(self):
        for split, (word, _) in SPLITS.items():
            self.pictures(split, f"images/{word}")
            hotcoco.COCO(self.coco[split]).to_yolo(str(self.root / f"labels/{word}"))
            (self.root / f"labels/{word}/data.yaml").unlink()
            for file in (self.root / f"labels/{word}").iterdir():
                file.write_text(file.read_text(), "utf-8-sig")
        content = {"path": "/elsewhere", "train": "images/train", "val": "images/val", "names": list(NAMES.values())}
        self.text("data.yaml", yaml.safe_dump(content))

    def _voc(self):
        for split, (word, _) in SPLITS.items():
            self.pictures(split, "JPEGImages")
            hotcoco.COCO(self.coco[split]).to_voc(str(self.root))
            stems = [Path(image["file_name"]).stem for image in self.coco[split]["images"]]
            self.text(f"ImageSets/Main/{word}.txt", "".join(f"{stem}\n" for stem in stems))
        (self.root / "labels.txt").unlink()


@pytest.fixture
def data_set(tmp_path):
    return DataSet(tmp_path / "data")


def _content(*sources):
    """{picture: (bytes, size, [(class, box), ...])} of some splits."""
    found = {}
    for source in sources:
        for k in range(len(source)):
            boxes, labels = source.targets(k)
            named = [
                (source.classes.name(label), *box) for label, box in zip(labels.tolist(), boxes.tolist(), strict=True)
            ]
            name = source.filename(k).rpartition("/")[2]
            found[name] = (
                source.image_bytes(k),
                source.sizes[k].tolist(),
                sorted(named),
                source.annotations(k).area.sum(),
            )
    return found


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (image, size, boxes, area) in expected.items():
        assert found[name][:2] == (image, size)
        assert [box[0] for box in found[name][2]] == [box[0] for box in boxes]
        np.testing.assert_allclose([box[1:] for box in found[name][2]], [box[1:] for box in boxes], atol=0.01)
        np.testing.assert_allclose(found[name][3], area, rtol=1e-3)


@pytest.mark.parametrize("layout", ["short", "roboflow", "one_file", "yolo", "voc"])
def test_one_data_set_is_the_same_in_every_layout(data_set, tmp_path, layout, caplog):
    """All text files have a byte order mark. COCO's own layout is what the others are compared with."""
    coco = DataSet(tmp_path / "coco").write("coco")
    sources = [data_set.write(layout).open(split) for split in SPLITS]
    expected = [coco.open(split) for split in SPLITS]
    assert sorted(sources[0].classes.names) == sorted(expected[0].classes.names)
    assert sources[0].classes.num_slots == 3 and sources[0].classes == sources[1].classes
    if layout == "one_file":
        assert [len(source) for source in sources] == [8, 2]
        _assert_same(_content(*sources), _content(*expected))
    else:
        for source, other in zip(sources, expected, strict=True):
            _assert_same(_content(source), _content(other))
    assert caplog.records == []


def test_pictures_without_a_division_are_divided_by_their_names(data_set):
    data_set.write("one_file")
    names = [f"{k}.png" for k in range(1000)]

    def validation(names, **fields):
        return set(split_share(names, "validation", data_set.config(**fields)))

    assert len(validation(names)) == 200 and validation(names).isdisjoint(
        split_share(names, "train", data_set.config())
    )
    assert validation(names) == validation(names[::-1])
    assert len(validation(names) & validation(names, split_seed=1)) < 80
    more = validation([*names, *(f"new {k}.png" for k in range(20))])
    assert len(validation(names) - more) < 10
    assert [len(data_set.open(split, val_share=0.5)) for split in SPLITS] == [5, 5]
    assert "config.data.val_share is 1.0; it must be above 0 and below 1." in data_set.refusal(val_share=1.0)
    assert "config.data.split_seed is -1; it must be at least 0." in data_set.refusal(split_seed=-1)


def test_voc_without_lists_is_divided(data_set):
    data_set.write("voc")
    shutil.rmtree(data_set.root / "ImageSets")
    assert [len(data_set.open(split)) for split in SPLITS] == [8, 2]


def test_two_layouts_at_once_are_refused_and_a_field_decides(data_set):
    data_set.write("yolo").write("voc")
    sentence = data_set.refusal()
    assert "has 2 layouts at once, YOLO's (data.yaml) and Pascal VOC's (Annotations and JPEGImages)" in sentence
    assert "config.data.layout=yolo or voc decides" in sentence
    assert len(data_set.open("train", layout="voc")) == 6
    assert "not the layout roboflow" in data_set.refusal(layout="roboflow")
    assert "config.data.layout is 'kitti'; it can be auto, coco" in data_set.refusal(layout="kitti")


def test_no_layout_says_what_was_looked_for(data_set):
    data_set.pictures("train", "photos")
    data_set.text("package.json", {"name": "no pictures"})
    sentence = data_set.refusal()
    for words in ("instances_train*.json", "_annotations.coco.json", "single .json", "data.yaml", "JPEGImages"):
        assert words in sentence
    inner = DataSet(data_set.root / "archive").write("voc")
    assert data_set.refusal().endswith(f"were looked for; {inner.root} has Pascal VOC's.")


def test_a_split_that_is_not_there_is_named(data_set):
    data_set.write("roboflow")
    expected = "has no split test: it was read in Roboflow's COCO export layout (_annotations.coco.json in its folders)"
    assert expected in data_set.refusal("test")
    assert data_set.refusal("test").endswith("it has train and validation.")


def test_two_annotation_files_of_a_split_are_refused(data_set):
    data_set.write("coco")
    data_set.text("annotations/instances_train2014.json", data_set.coco["train"])
    assert "has 2 annotation files of its split train, instances_train2014.json and" in data_set.refusal()
    assert len(data_set.open("train", train_annotations="annotations/instances_train2017.json")) == 6


def test_splits_whose_pictures_have_the_same_names(data_set):
    data_set.write("short")
    for folder, names in (("train", "train_0.png"), ("val", "val_0.png")):
        data_set.coco[{"train": "train", "val": "validation"}[folder]]["images"][0]["file_name"] = "same.png"
        (data_set.root / folder / names).rename(data_set.root / folder / "same.png")
        data_set.text(f"{folder}.json", data_set.coco[{"train": "train", "val": "validation"}[folder]])
    for split, word in (("train", "train"), ("validation", "val")):
        source = data_set.open(split)
        assert source.image_bytes(0) == (data_set.root / word / "same.png").read_bytes()


def test_pictures_that_are_nowhere_are_named_with_what_is_near(data_set):
    data_set.write("short")
    for file in (data_set.root / "train").iterdir():
        file.rename(file.with_name(file.name.upper()))
    sentence = data_set.refusal()
    assert (
        "No folder in" in sentence and "the first is train_0.png (there is train/TRAIN_0.PNG, which differs" in sentence
    )


def test_a_roboflow_class_that_is_used_stays_also_when_others_have_its_name_as_parent(data_set):
    data_set.coco["validation"]["annotations"][0]["category_id"] = 0
    source = data_set.write("roboflow").open("train")
    assert source.classes.names == ("things", "dog", "cat", "traffic light")


def test_a_split_without_annotations_is_read_and_not_trained_on(data_set):
    data_set.write("coco")
    images = data_set.coco["validation"]["images"]
    data_set.pictures("validation", "test2017")
    info = {"images": images, "categories": data_set.coco["train"]["categories"]}
    data_set.text("annotations/image_info_test2017.json", info)
    data_set.text("annotations/image_info_test-dev2017.json", info)
    source = data_set.open("test")
    assert len(source) == 4 and not source.annotated and source.classes == data_set.open("train").classes
    assert data_set.open("validation").annotated
    with pytest.raises(UserError, match="has a box to learn"):
        TrainBatches(source, data_set.config(batch_size=1), seed=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 20 30", "line 1: 20 is no share of the picture; YOLO's go from 0 to 1."),
        ("3 0.5 0.5 0.1 0.1", "line 1: class 3 is none of the 3 from 0 on."),
        ("1.5 0.5 0.5 0.1 0.1", "line 1: class 1.5 is none of the 3"),
        ("\n0 0.5 0.5 0.1", "line 2: 3 numbers follow the class; a box has 4"),
        ("0 0.5 0.5 0.1 0.1 0.9", "line 1: 5 numbers follow the class"),
        ("dog 0.5 0.5 0.1 0.1", "line 1: 'dog 0.5 0.5 0.1 0.1' are not numbers."),
        ("0 nan 0.5 0.1 0.1", "line 1: nan is no share"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(data_set, line, words):
    data_set.write("yolo").text("labels/train/train_0.txt", line)
    assert f"labels/train/train_0.txt, {words}" in data_set.refusal()


def test_what_yolos_folders_may_have(data_set, caplog):
    """Outlines, numbered names, Roboflow's ../, pictures and labels without each other, folders in folders."""
    data_set.write("yolo")
    content = {"train": "../images/train", "val": ["images/val"], "names": dict(enumerate(NAMES.values()))}
    data_set.text("data.yaml", yaml.safe_dump(content))
    data_set.text("labels/train/train_1.txt", "2 0.1 0.2 0.5 0.1 0.3 0.6")
    (data_set.root / "labels/train/train_2.txt").rename(data_set.root / "labels/train/Train_2.txt")
    for kind, ending in (("images", "png"), ("labels", "txt")):
        (data_set.root / kind / "train" / "inner").mkdir()
        file = data_set.root / kind / "train" / f"train_4.{ending}"
        file.rename(file.parent / "inner" / file.name)
    source = data_set.open("train")
    names = [source.filename(k) for k in range(len(source))]
    assert names[0] == "images/train/inner/train_4.png" and len(names) == 6
    height, width = source.sizes[names.index("images/train/train_1.png")]
    box = source.targets(names.index("images/train/train_1.png"))[0][0]
    np.testing.assert_allclose(box, [0.1 * width, 0.1 * height, 0.5 * width, 0.6 * height], rtol=1e-6)
    assert "1 pictures have no label file" in caplog.text
    assert "1 label files have no picture (the first is labels/train/Train_2.txt)" in caplog.text


def test_yolos_folders_may_be_links(data_set):
    """Also one that leads back to where it lies."""
    data_set.write("yolo")
    before = sorted(data_set.open("train").filenames.tolist())
    for kind, ending in (("images", "png"), ("labels", "txt")):
        folder, elsewhere = data_set.root / kind / "train", data_set.root.parent / kind
        elsewhere.mkdir()
        (folder / f"train_4.{ending}").rename(elsewhere / f"train_4.{ending}")
        (folder / "more").symlink_to(elsewhere)
        (folder / "back").symlink_to(folder)
        (folder / "real").mkdir()
        (folder / f"train_3.{ending}").rename(folder / "real" / f"train_3.{ending}")
        for name in ("a", "z"):
            (folder / name).symlink_to("real")
    after = sorted(data_set.open("train").filenames.tolist())
    kept = set(before) - {"images/train/train_3.png", "images/train/train_4.png"}
    assert after == sorted(kept | {"images/train/real/train_3.png", "images/train/more/train_4.png"})


@pytest.mark.parametrize("points", ["0.45 0.45 0.55 0.55", "0.45 0.45 2 0.55 0.55 0"])
def test_yolos_poses_have_boxes(data_set, points):
    data_set.write("yolo")
    content = yaml.safe_load((data_set.root / "data.yaml").read_text("utf-8-sig")) | {"kpt_shape": [2, 2]}
    data_set.text("data.yaml", yaml.safe_dump(content))
    data_set.text("labels/train/train_0.txt", f"0 0.5 0.5 0.2 0.4 {points}")
    source = data_set.open("train")
    height, width = source.sizes[0]
    expected = [0.4 * width, 0.3 * height, 0.6 * width, 0.7 * height]
    np.testing.assert_allclose(source.targets(0)[0], [expected], rtol=1e-6)


def test_yolos_lists_and_labels_beside_their_pictures(tmp_path):
    """Also where a folder around the data set is called images."""
    data_set = DataSet(tmp_path / "images" / "data").write("yolo")
    expected = _content(data_set.open("train"))
    for picture in (data_set.root / "images/train").iterdir():
        picture.rename(data_set.root / picture.name)
        label = (data_set.root / "labels/train" / picture.name).with_suffix(".txt")
        label.rename(data_set.root / label.name)
    data_set.text("lists/train.txt", "".join(f"./train_{k}.png\n" for k in range(6)))
    data_set.text("data.yaml", yaml.safe_dump({"train": "lists\\train.txt", "names": list(NAMES.values())}))
    _assert_same(_content(data_set.open("train")), expected)


def test_yolos_boxes_are_of_the_turned_picture(data_set):
    data_set.write("yolo")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(data_set.root / "images/train/train_1.png", exif=exif)
    data_set.text("labels/train/train_1.txt", "0 0.5 0.25 0.5 0.5")
    source = data_set.open("train")
    assert source.sizes[1].tolist() == [60, 40]
    np.testing.assert_allclose(source.targets(1)[0], [[10, 0, 30, 30]])
    assert source.annotations(1).area.tolist() == [0.25 * 2400]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("names: [a\n", "data.yaml is not YAML"),
        ("names: 3\ntrain: images/train\n", "names is 3, neither a list nor"),
        ("names: [a]\ntrain: photos\n", "split train is photos, and there is no"),
        ("names: [a]\ntrain: labels\n", "its split train, labels, has no picture."),
    ],
)
def test_a_wrong_data_yaml_is_named(data_set, content, words):
    data_set.write("yolo").text("data.yaml", content)
    assert words in data_set.refusal()


@pytest.mark.parametrize("sign", [" (1)", "-1", "+", "_1"])
def test_a_name_of_voc_may_begin_as_another_one_does(data_set, sign):
    """As files "a.xml" and "a (1).xml" have another order than "a" and "a (1)"."""
    before = _content(data_set.write("voc").open("train"))
    for folder, ending in (("Annotations", "xml"), ("JPEGImages", "png")):
        file = data_set.root / folder / f"train_2.{ending}"
        file.rename(file.with_name(f"train_1{sign}.{ending}"))
    shutil.rmtree(data_set.root / "ImageSets")
    after = _content(data_set.open("train"), data_set.open("validation"))
    for name, other in (("train_1.png", "train_1.png"), ("train_2.png", f"train_1{sign}.png")):
        assert after[other][2] == before[name][2] != []


def test_names_of_voc_with_spaces_and_what_tools_leave_beside_them(data_set):
    before = _content(data_set.write("voc").open("train"))
    names = data_set.root / "ImageSets" / "Main" / "train.txt"
    listed = names.read_text("utf-8-sig").splitlines()
    for folder, ending in (("Annotations", "xml"), ("JPEGImages", "png")):
        file = data_set.root / folder / f"{listed[2]}.{ending}"
        file.rename(file.with_name(f"IMG 0.{ending}"))
    (data_set.root / "JPEGImages" / "IMG 0.txt").write_text("of an annotation tool")
    (data_set.root / "JPEGImages" / f"{listed[1]}.json").write_text("{}")
    names.write_text("".join(f"{line}\n" for line in [f"{listed[0]} -1", f"{listed[1]}  1", "IMG 0", *listed[3:]]))
    (data_set.root / "Annotations" / "IMG 0 1.txt").touch()
    shutil.copy(data_set.root / "JPEGImages" / "IMG 0.png", data_set.root / "JPEGImages" / "photo 1.png")
    names.write_text(names.read_text() + "photo 1\n")
    after = _content(data_set.open("train"))
    assert after.pop("photo 1.png")[2] == []
    assert after.pop("IMG 0.png")[2] == before.pop(f"{listed[2]}.png")[2] != []
    assert after == before


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere.json")])
def test_what_is_called_as_a_json_file_and_is_none(data_set, make):
    expected = _content(data_set.write("short").open("train"))
    make(data_set.root / "notes.json")
    assert _content(data_set.open("train")) == expected


def test_what_vocs_folders_may_have(data_set, caplog):
    """File names of another copy, difficult objects, boxes that begin at 0, and listed pictures without annotations."""
    data_set.write("voc")
    file = data_set.root / "Annotations" / "train_1.xml"
    text = file.read_text()
    file.write_text(text.replace("train_1.png", "IMG_0001.JPG").replace("<difficult>0", "<difficult>1"))
    (data_set.root / "Annotations" / "train_0.xml").unlink()
    source = data_set.open("train")
    assert [source.filename(k) for k in range(2)] == ["train_0.png", "train_1.png"]
    assert source.annotations(1).is_crowd.tolist() == [True] and len(source.targets(1)[0]) == 0
    (record,) = caplog.records
    assert record.getMessage().endswith("1 pictures have no XML file, and so no box (the first is train_0).")

    file = data_set.root / "Annotations" / "train_2.xml"
    before = source.targets(2)[0]
    text = file.read_text()
    start, end = text.index("<xmin>") + 6, text.index("</xmin>")
    file.write_text(f"{text[:start]}0{text[end:]}")
    source = data_set.open("train")
    assert "boxes begin at 0" in caplog.text
    after = source.targets(2)[0]
    np.testing.assert_array_equal(after[1], before[1] + [1, 1, 0, 0])
    file.write_text("<annotation><filename>a.png</filename><object><name>dog</name></object></annotation>")
    assert "is not Pascal VOC's: " in data_set.refusal() and "train_2.xml" in data_set.refusal()


def test_a_name_that_is_no_utf8_is_refused(data_set):
    data_set.write("yolo")
    os.rename(data_set.root / "images/train/train_1.png", os.fsencode(data_set.root) + b"/images/train/caf\xe9.png")
    assert "caf\\udce9.png' is no UTF-8; it needs another one." in data_set.refusal()


def test_every_layout_is_a_choice():
    assert set(LAYOUTS) == {"coco", "roboflow", "one_file", "yolo", "voc"}

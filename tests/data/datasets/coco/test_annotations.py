import numpy as np
import pytest

from deperceiver_jax.data.datasets.coco.annotations import read_coco
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError


def _first(key, **fields):
    """A change to the first item of a list; a field of None is removed."""

    def change(content):
        for name, value in fields.items():
            if value is None:
                del content[key][0][name]
            else:
                content[key][0][name] = value

    return change


def _refusal(coco_folder, change):
    boxes = [coco_folder.annotation(1, 7, [1, 2, 3, 4]), coco_folder.annotation(2, 3, [1, 2, 3, 4])]
    coco_folder.write(boxes, change=change)
    with pytest.raises(UserError) as refusal:
        read_coco(coco_folder.annotation_file())
    sentence = str(refusal.value)
    assert "instances_train2017.json" in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_images_are_ordered_by_id_and_annotations_as_written(coco_folder):
    boxes = [
        coco_folder.annotation(9, 7, [10.5, 2, 3, 4], category_id=5, area=7.25),
        coco_folder.annotation(4, 7, [1, 2, 3, 4], iscrowd=1),
    ]
    coco_folder.write(boxes)
    coco = read_coco(coco_folder.annotation_file())
    assert (coco.image_ids, coco.filenames) == ([3, 7], ["3.jpg", "7.jpg"])
    assert coco.categories == [(1, "cat"), (5, "dog")]
    assert coco.stated_sizes == [(30, 50), (40, 60)]
    empty, both = coco.annotations
    assert [column.shape for column in empty] == [(0, 4), (0,), (0,), (0,), (0,)]
    np.testing.assert_array_equal(both.boxes, [[10.5, 2, 3, 4], [1, 2, 3, 4]])
    np.testing.assert_array_equal(both.category_id, [5, 1])
    np.testing.assert_array_equal(both.is_crowd, [False, True])
    np.testing.assert_array_equal(both.area, [7.25, 1.0])
    np.testing.assert_array_equal(both.id, [9, 4])
    assert coco.notes == []


def test_what_coco_files_may_lack(coco_folder):
    """No iscrowd means no crowd, no area means the box's; an image need not state its size."""

    def change(content):
        del content["annotations"][0]["iscrowd"], content["annotations"][0]["area"], content["images"][1]["width"]

    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3, 4.5])], change=change)
    coco = read_coco(coco_folder.annotation_file())
    assert (coco.annotations[0].is_crowd.tolist(), coco.annotations[0].area.tolist()) == ([False], [13.5])
    assert coco.notes == ["1 annotations had no area and got their box's"]
    assert coco.stated_sizes == [None, (40, 60)]


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_refused(coco_folder, key):
    if key != "annotations":  # which a test split lacks
        assert f"no list called '{key}'" in _refusal(coco_folder, lambda content: content.pop(key))
    assert f"no list called '{key}'" in _refusal(coco_folder, lambda content: content.update({key: {}}))


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_empty_list_is_refused(coco_folder, key):
    assert f"its list '{key}' is empty" in _refusal(coco_folder, lambda content: content[key].clear())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_first("images", id=None), "images[0] has no 'id'"),
        (_first("images", file_name=None), "images[0] has no 'file_name'"),
        (_first("images", file_name=3), "file_name of images[0] is 3, not a text"),
        (_first("images", id="7"), "id of images[0] is '7', not an integer"),
        (_first("categories", name=None), "categories[0] has no 'name'"),
        (_first("categories", id=2**70), f"id of categories[0] is {2**70}, not an integer"),
        (_first("categories", id="1"), "id of categories[0] is '1', not an integer"),
        (_first("annotations", image_id="7"), "image_id of annotations[0] is '7', not an integer"),
        (_first("annotations", category_id=1.0), "category_id of annotations[0] is 1.0, not an integer"),
        (_first("annotations", bbox=None), "annotation 1 has no 'bbox'"),
        (_first("annotations", bbox=[1, 2, 3]), "bbox of annotation 1 is [1, 2, 3], not four numbers"),
        (_first("annotations", bbox=[1, 2, 3, "4"]), "bbox of annotation 1 is [1, 2, 3, '4'], not four numbers"),
        (_first("annotations", image_id=None), "annotations[0] has no 'image_id'"),
        (_first("annotations", id=True), "id of annotations[0] is True, not an integer"),
        (_first("annotations", iscrowd=2), "iscrowd of annotation 1 is 2"),
        (_first("annotations", image_id=8), "annotation 1 is of image 8, which the file does not list"),
        (_first("annotations", category_id=2), "annotation 1 has category 2, which the file does not list"),
        (_first("annotations", id=2), "annotation id 2 is there twice"),
        (_first("images", id=3), "image id 3 is there twice"),
        (_first("categories", id=5), "category id 5 is there twice ('cat' and 'dog')"),
        (lambda content: content["annotations"].append(3), "annotations[2] is a int, not an object"),
    ],
)
def test_a_wrong_item_is_named(coco_folder, change, words):
    assert words in _refusal(coco_folder, change)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"images": [', "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"[1]", "holds a list, not an object")],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, content, words):
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"instances.json is not COCO: it .*{words}"):
        read_coco(path)


def test_a_byte_order_mark_is_read_over(coco_folder):
    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3, 4])])
    file = coco_folder.annotation_file()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_coco(file).image_ids == [3, 7]
    assert len(open_source(coco_folder.config(), "train").targets(0)[0]) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.json cannot be read: No such file"):
        read_coco(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_coco(tmp_path)


def test_boxes_of_any_extent_pass(coco_folder):
    """Python's JSON reads NaN and Infinity; what becomes of such boxes is decided where the image's size is known."""
    boxes = [[float("nan"), 0, 1, 1], [0, 0, float("inf"), 1], [-5, -5, -1, 0]]
    coco_folder.write([coco_folder.annotation(k, 3, box) for k, box in enumerate(boxes)])
    np.testing.assert_array_equal(read_coco(coco_folder.annotation_file()).annotations[0].boxes, boxes)

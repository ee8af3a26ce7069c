import logging
import pickle

import numpy as np
import pytest

from deperceiver_jax.data.batches.loader import TrainBatches
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError


def _open(coco_folder, boxes, **fields):
    """Image 3 of 50 x 30 pixels (width x height) with these annotations; image 7 has none."""
    coco_folder.write([coco_folder.annotation(k + 1, 3, **box) for k, box in enumerate(boxes)])
    return open_source(coco_folder.config(**fields), "train")


def test_sizes_and_order_come_from_ids_and_headers(coco_folder):
    source = _open(coco_folder, [])
    assert len(source) == 2
    np.testing.assert_array_equal(source.image_ids, [3, 7])
    np.testing.assert_array_equal(source.sizes, [[30, 50], [40, 60]])
    assert (source.sizes.dtype, source.image_ids.dtype) == (np.int32, np.int64)


def test_an_image_without_boxes_is_kept(coco_folder):
    source = _open(coco_folder, [{"bbox": [1, 2, 3, 4]}])
    boxes, labels = source.targets(1)
    assert (boxes.shape, boxes.dtype, labels.shape, labels.dtype) == ((0, 4), np.float32, (0,), np.int32)
    assert source.annotations(1).boxes.shape == (0, 4)
    assert source.max_boxes == 1


def test_a_data_set_without_any_box_opens(coco_folder):
    source = _open(coco_folder, [])
    assert source.max_boxes == 0
    assert source.targets(0)[0].shape == (0, 4)


def test_crowds_are_annotations_and_no_targets(coco_folder):
    source = _open(coco_folder, [{"bbox": [1, 2, 3, 4], "iscrowd": 1}, {"bbox": [5, 6, 7, 8], "category_id": 5}])
    annotations = source.annotations(0)
    np.testing.assert_array_equal(annotations.is_crowd, [True, False])
    np.testing.assert_array_equal(annotations.category_id, [1, 5])
    boxes, labels = source.targets(0)
    np.testing.assert_array_equal(boxes, [[5, 6, 12, 14]])
    np.testing.assert_array_equal(labels, [1])  # the second of two classes
    assert source.max_boxes == 1


def test_boxes_are_clamped_in_float32(coco_folder):
    """DETR adds width to x in float32; summed in float64 and rounded then, the second box would end elsewhere."""
    source = _open(coco_folder, [{"bbox": [-3.5, 10, 60, 99]}, {"bbox": [10.79, 1.0, 7.24, 2.0]}])
    boxes, _ = source.targets(0)
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes[0], [0, 10, 50, 30])
    assert boxes[1, 2] == np.float32(10.79) + np.float32(7.24) != np.float32(10.79 + 7.24)
    np.testing.assert_array_equal(source.annotations(0).boxes[0], [-3.5, 10, 60, 99])  # kept as written
    assert source.annotations(0).boxes[1, 0] == 10.79  # in float64


def test_odd_boxes_are_counted_in_one_line(coco_folder, caplog):
    nan, inf = float("nan"), float("inf")
    good = {"bbox": [1, 2, 3, 4]}
    clipped = [{"bbox": [-9, 2, 20, 4]}, {"bbox": [40, 2, 20, 4]}, {"bbox": [49.9, 2, 0.4, 1]}]  # the last by rounding
    empty = [{"bbox": [1, 2, 0, 4]}, {"bbox": [9, 2, -3, 4]}, {"bbox": [60, 2, 3, 4]}, {"bbox": [-9, 2, 3, 4]}]
    odd = [{"bbox": [nan, 2, 3, 4]}, {"bbox": [1, 2, inf, 4]}]
    source = _open(coco_folder, [good, *clipped, *empty, *odd])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    message = warnings[0].getMessage()
    assert "2 boxes reach outside their image and are clipped" in message
    assert "4 boxes are empty inside their image and are left out" in message
    assert "2 boxes are not finite and are left out" in message
    boxes, _ = source.targets(0)
    assert len(boxes) == 4
    np.testing.assert_array_equal(boxes[:3], [[1, 2, 4, 6], [0, 2, 11, 6], [40, 2, 50, 6]])
    assert len(source.annotations(0).id) == 8  # a box that is not finite cannot be evaluated either


@pytest.mark.parametrize("boxes", [[], [{"bbox": [1, 2, 3, 4], "iscrowd": 1}], [{"bbox": [60, 2, 3, 4]}]])
def test_a_split_without_a_target_can_be_evaluated_and_not_trained_on(coco_folder, boxes):
    source = _open(coco_folder, boxes)
    with pytest.raises(UserError, match="None of the 2 images in .*coco, split train, has a box to learn"):
        TrainBatches(source, coco_folder.config(batch_size=1), seed=0)


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]], "they look normalised, as YOLO's are,"),
        ([[1.02, 0.2, 0.3, 0.4], [-0.03, 0.5, 0.5, 0.5]], "they look normalised"),  # the centre or the border
        ([[10, 2, 0.3, 0.4], [20, 3, 0.9, 0.1]], "sizes look normalised,"),
    ],
)
def test_boxes_that_are_not_in_pixels_are_refused(coco_folder, boxes, words):
    with pytest.raises(UserError, match=f"coco, split train: all 2 boxes are smaller than a pixel; {words}"):
        _open(coco_folder, [{"bbox": box} for box in [*boxes, [0, 0, 0, 0]]])


def test_some_boxes_smaller_than_a_pixel_are_counted(coco_folder, caplog):
    """COCO has such boxes; they are learned."""
    source = _open(coco_folder, [{"bbox": [1, 2, 3, 4]}, {"bbox": [10, 20, 0.5, 0.25]}])
    assert "1 boxes are smaller than a pixel" in caplog.text
    assert len(source.targets(0)[0]) == 2


def test_a_clean_data_set_warns_of_nothing(coco_folder, caplog):
    _open(coco_folder, [{"bbox": [0, 0, 50, 30]}])
    assert caplog.records == []


def test_more_boxes_than_most_models_have_queries(coco_folder):
    source = _open(coco_folder, [{"bbox": [k % 40, k % 20, 5, 5]} for k in range(150)])
    assert source.max_boxes == 150
    assert len(source.targets(0)[0]) == 150


def test_targets_are_copies(coco_folder):
    source = _open(coco_folder, [{"bbox": [1, 2, 3, 4]}])
    source.targets(0)[0][:] = 0
    np.testing.assert_array_equal(source.targets(0)[0], [[1, 2, 4, 6]])


def test_a_pickled_source_reads_the_same(coco_folder):
    source = _open(coco_folder, [{"bbox": [1, 2, 3, 4]}])
    image = source.image_bytes(1)  # opens the files, which must not travel
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image_bytes(1) == image == coco_folder.image_file("7.jpg").read_bytes()
    np.testing.assert_array_equal(copy.targets(0)[0], source.targets(0)[0])
    assert copy.classes == source.classes


@pytest.mark.parametrize(
    ("fields", "split", "words"),
    [
        ({"name": "coco"}, "train", "config.data.name is 'coco'; it may be shapes, coco_directory or tfds"),
        ({"name": "tfds/x"}, "train", "config.data.name is 'tfds/x'"),
        ({"name": "shapes/huge"}, "train", "no data set shapes/huge; there are standard, small"),
        ({"name": "shapes"}, "test", "Data set shapes has no split 'test'; it has train, validation"),
        ({}, "val", "Data set coco_directory has no split 'val'; it has train, validation"),
        ({"directory": ""}, "train", "config.data.directory is empty, and data set coco_directory needs one"),
        ({"directory": "/no/such/place"}, "train", "There is no directory /no/such/place"),
    ],
)
def test_a_wrong_setting_is_named(coco_folder, fields, split, words):
    with pytest.raises(UserError) as refusal:
        open_source(coco_folder.config(**fields), split)
    assert words in str(refusal.value)
    assert coco_folder.leftovers() == []


def test_ids_of_64_bits_come_back_as_they_are(coco_folder):
    """Of images, categories and annotations, negative ones and such as no double tells apart: through TFDS and back."""
    images = {2**62 + 1: (30, 50), 2**62: (40, 60), -5: (20, 20)}
    categories = [{"id": 2**61 + 1, "name": "cat"}, {"id": 2**61, "name": "dog"}, {"id": -(2**61), "name": "owl"}]
    boxes = [coco_folder.annotation(2**63 - 1 - k, 2**62 + k, [1, 2, 3, 4], category_id=2**61 + k) for k in range(2)]
    coco_folder.write(
        [*boxes, coco_folder.annotation(-9, -5, [1, 2, 3, 4], -(2**61))], sizes=images, categories=categories
    )
    source = open_source(coco_folder.config(), "train")
    assert source.image_ids.tolist() == [-5, 2**62, 2**62 + 1]
    assert source.classes.category_ids == (-(2**61), 2**61, 2**61 + 1)
    for k, (id, category) in enumerate([(-9, -(2**61)), (2**63 - 1, 2**61), (2**63 - 2, 2**61 + 1)]):
        assert source.annotations(k).id.tolist() == [id]
        assert source.annotations(k).category_id.tolist() == [category]
        assert source.targets(k)[1].tolist() == [k]

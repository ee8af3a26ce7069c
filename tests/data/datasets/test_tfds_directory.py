"""A directory like the one TFDS's catalogue prepares for coco/2017, written here without TensorFlow."""

import io

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from configs.base import base
from deperceiver_jax.data.classes import COCO_CATEGORIES
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError

ROWS = [  # label, (ymin, xmin, ymax, xmax), is_crowd
    (0, (0.1, 0.2, 0.5, 1.0), False),
    (79, (0.0, 0.0, 0.5, 0.5), False),
    (11, (0.0, 0.0, 1.0, 1.0), True),
]
IMAGES = {42: ((30, 50), ROWS), 7: ((40, 60), [])}  # image id: (height, width) and annotations


def _jpeg(size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels)


class CatalogueCoco(tfds.core.GeneratorBasedBuilder):
    """The features of the catalogue's own builder; `images` are the encoded images by id."""

    VERSION = tfds.core.Version("1.1.0")
    names = list(COCO_CATEGORIES.values())
    images = {id: _jpeg(size, id) for id, (size, _) in IMAGES.items()}
    leave_out = None

    def _info(self):
        objects = {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=self.names),
        }
        objects = {name: feature for name, feature in objects.items() if name != self.leave_out}
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for id, (_, rows) in IMAGES.items():
            objects = []
            for k, (label, box, crowd) in enumerate(rows):
                row = {"area": 100 + k, "id": 10 * id + k, "is_crowd": crowd, "label": label}
                objects.append(row | {"bbox": tfds.features.BBox(*box)})
            objects = [{key: value for key, value in row.items() if key != self.leave_out} for row in objects]
            yield id, {"image": self.images[id], "image/filename": f"{id}.jpg", "image/id": id, "objects": objects}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Writes the directory, with some attributes of the builder changed, and gives the config.data that reads it."""

    def write(file_format="array_record", **changes):
        for name, value in changes.items():
            monkeypatch.setattr(CatalogueCoco, name, value)
        builder = CatalogueCoco(data_dir=str(tmp_path / "tfds"), file_format=file_format)
        builder.download_and_prepare(download_dir=str(tmp_path / "downloads"))
        data = base().data
        data.name, data.directory = "tfds", str(builder.data_dir)
        data.prepared_directory = str(tmp_path / "prepared")
        return data

    return write


def test_normalised_boxes_become_pixels_and_labels_coco_ids(prepare):
    source = open_source(prepare(), "validation")
    np.testing.assert_array_equal(source.image_ids, [7, 42])
    np.testing.assert_array_equal(source.sizes, [[40, 60], [30, 50]])
    assert source.classes.num_slots == 91 and source.classes.category_ids == tuple(COCO_CATEGORIES)
    annotations = source.annotations(1)
    np.testing.assert_allclose(annotations.boxes, [[10, 3, 40, 12], [0, 0, 25, 15], [0, 0, 50, 30]], atol=1e-5)
    np.testing.assert_array_equal(annotations.category_id, [1, 90, 13])
    np.testing.assert_array_equal(annotations.is_crowd, [False, False, True])
    np.testing.assert_array_equal(annotations.area, [100, 101, 102])
    np.testing.assert_array_equal(annotations.id, [420, 421, 422])
    boxes, labels = source.targets(1)
    np.testing.assert_allclose(boxes, [[10, 3, 50, 15], [0, 0, 25, 15]], atol=1e-5)
    np.testing.assert_array_equal(labels, [1, 90])
    assert source.targets(0)[0].shape == (0, 4)
    assert source.image_bytes(1) == CatalogueCoco.images[42]


def test_shares_are_of_the_turned_picture(prepare):
    """A phone's picture, stored as 50 x 30 pixels (height x width) and annotated upright: boxes as if it were."""
    pixels, exif, file = np.zeros((50, 30, 3), np.uint8), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    data = prepare(images=CatalogueCoco.images | {42: file.getvalue()})
    source = open_source(data, "validation")
    np.testing.assert_array_equal(source.sizes, [[40, 60], [30, 50]])
    np.testing.assert_allclose(source.annotations(1).boxes[0], [10, 3, 40, 12], atol=1e-5)
    data.exif_orientation = "ignore"
    np.testing.assert_allclose(open_source(data, "validation").annotations(1).boxes[0], [6, 5, 24, 20], atol=1e-5)


def test_other_classes_than_cocos_get_contiguous_slots(prepare):
    names = [f"class {k}" for k in range(80)]
    source = open_source(prepare(names=names), "validation")
    assert source.classes.num_slots == 80
    assert source.classes.slots == source.classes.category_ids == tuple(range(80))
    np.testing.assert_array_equal(source.targets(1)[1], [0, 79])


def test_an_unknown_split_is_refused(prepare):
    with pytest.raises(UserError, match="has no split 'train'; it has validation"):
        open_source(prepare(), "train")


def test_a_corrupt_image_is_named_or_passed_over(prepare, caplog):
    data = prepare(images={42: b"\xff\xd8nonsense", 7: CatalogueCoco.images[7]})
    with pytest.raises(UserError, match=r"image 42.jpg \(id 42\) is corrupt: its JPEG header is broken"):
        open_source(data, "validation")
    data.skip_corrupt = True
    source = open_source(data, "validation")
    assert source.image_ids.tolist() == [7]
    assert "1 corrupt images are left out (the first is 42.jpg)" in caplog.text


def test_files_without_random_access_are_refused(prepare):
    """TFDS writes TFRecord only with TensorFlow, so a data set that says it is stored so must do."""
    data = prepare()
    info = tfds.core.Path(data.directory) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is stored as tfrecord, which has no random access"):
        open_source(data, "validation")


def test_another_schema_is_refused(prepare):
    with pytest.raises(UserError, match="is not like coco/2017: it has no feature objects/is_crowd"):
        open_source(prepare(leave_out="is_crowd"), "validation")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_what_is_no_tfds_directory_is_refused(tmp_path, content):
    data = base().data
    data.name, data.directory, data.prepared_directory = "tfds", str(tmp_path), str(tmp_path / "prepared")
    with pytest.raises(UserError, match="is no prepared TFDS data set: it has no dataset_info.json"):
        open_source(data, "validation")
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read as a TFDS data set"):
        open_source(data, "validation")

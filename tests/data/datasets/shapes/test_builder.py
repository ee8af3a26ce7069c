import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.data.datasets.source import open_source

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(drawing, "IMAGES", {"train": 6, "validation": 4})


def test_shapes_open_like_any_data_set(coco_folder, few_images):
    sources = [open_source(coco_folder.config(name="shapes"), split) for split in ("train", "validation")]
    assert [len(source) for source in sources] == [6, 4]
    assert sources[0].classes == sources[1].classes
    assert sources[0].classes.names == drawing.CLASSES
    assert sources[0].classes.category_ids == (1, 2, 3, 4)
    for split, source in zip(("train", "validation"), sources, strict=True):
        for position in range(len(source)):
            picture = drawing.draw(drawing.RECIPES["standard"], split, position)
            np.testing.assert_array_equal(source.sizes[position], picture.image.shape[:2])
            np.testing.assert_array_equal(source.annotations(position).boxes, picture.boxes)
            np.testing.assert_array_equal(source.targets(position)[1], picture.labels)
            decoded = simplejpeg.decode_jpeg(source.image_bytes(position)).astype(np.float64)
            assert np.abs(decoded - picture.image).mean() < 6  # JPEG's loss on noise


def test_the_two_variants_are_two_data_sets(coco_folder, few_images):
    standard = open_source(coco_folder.config(name="shapes"), "train")
    small = open_source(coco_folder.config(name="shapes/small"), "train")
    assert small.max_boxes > drawing.RECIPES["standard"].objects[1] >= standard.max_boxes


def test_it_is_prepared_without_tensorflow_or_jax(tmp_path):
    """A TensorFlow that fails on import stands in for the real one, whether that is installed or not."""
    stand_in = tmp_path / "modules" / "tensorflow"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("raise AssertionError('TensorFlow was imported')")
    code = (
        "import sys\n"
        "from configs.base import base\n"
        "from deperceiver_jax.data.datasets.shapes import drawing; drawing.IMAGES = {'train': 3, 'validation': 1}\n"
        "from deperceiver_jax.data.datasets.source import open_source\n"
        "data = base().data; data.name, data.prepared_directory = 'shapes', sys.argv[1]\n"
        "print(len(open_source(data, 'train').image_bytes(2)) > 1000, 'jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(stand_in.parent)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "True False\n"), run.stderr

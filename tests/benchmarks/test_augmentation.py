"""What the augmentations' benchmarks train on, and that their settings exist."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import augmentation, input_augmentation
from benchmarks.input_pipeline import encode_jpeg, photograph
from configs import ladder
from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.models import field_needs
from deperceiver_jax.program.command_line import parse_config


def test_the_folder_has_the_built_in_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "PICTURES", {"train": 3, "validation": 2})
    augmentation.write_pictures(tmp_path / "pictures")
    config = ladder.get_config("deperceiver_plus").data
    config.update(name="coco_directory", directory=str(tmp_path / "pictures"))
    config.prepared_directory = str(tmp_path / "prepared")
    for split, count in augmentation.PICTURES.items():
        source = open_source(config, split)
        assert len(source) == count and source.classes.names == drawing.CLASSES
        picture = drawing.draw(drawing.RECIPES["small"], split, count - 1)
        assert tuple(source.sizes[-1]) == picture.image.shape[:2]
        boxes, labels = source.targets(count - 1)
        np.testing.assert_array_equal(boxes[:, :2], picture.boxes[:, :2])
        np.testing.assert_array_equal(labels, picture.labels)


@pytest.mark.parametrize("setting", augmentation.SETTINGS)
def test_every_setting_has_an_effect(setting):
    config = ladder.get_config(augmentation.ROW)
    parse_config(["train.py", *augmentation.FIELDS, *augmentation.SETTINGS[setting]], config, needs=field_needs)


def test_rates_of_every_setting():
    data = [encode_jpeg(photograph(60, 80, seed)) for seed in range(4)]
    config = ConfigDict({**base().data, "batch_size": 2, "num_workers": 0})
    rates = input_augmentation.augmentation_rates(data, np.int32([(60, 80)] * 4), config, rounds=1)
    assert set(rates) == set(input_augmentation.SETTINGS) and min(rates.values()) > 0

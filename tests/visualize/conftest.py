"""A tiny DETR that answers from two layers, stored as import-weights stores one, behind mean pixels."""

import numpy as np
import pytest

from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.runs.stored_detector import save_params
from deperceiver_jax.runs.workdir import config_text
from tests.drawn_arrays import Patches, abstract_detector


def tiny_config():
    """Small enough that only compiling it takes time."""
    from configs.detr import get_config

    config = get_config("r50")
    model = config.model
    model.backbone.update(depth=18, width=8, norm="group_norm", frozen_stages=0)
    model.update(num_queries=6, embed_dim=32)
    model.encoder.update(num_layers=2, mlp_dim=32)
    model.decoder.update(num_layers=2, mlp_dim=32)
    config.loss.classification = "sigmoid_focal"
    config.data.eval_buckets = 1
    return config


@pytest.fixture(scope="session")
def store_detr(random_arrays, tmp_path_factory):
    """store_detr(config, classes): a directory with these and drawn arrays, for a test `behind_patches`."""

    def store(config, classes: ClassMap):
        directory = tmp_path_factory.mktemp("tiny_detr")
        config.model.num_classes = classes.num_slots
        config.train.compilation_cache = str(tmp_path_factory.getbasetemp() / "compiled_figures")
        _, params, others = take_apart(abstract_detector(config, Patches))
        arrays = random_arrays({**params, **others})
        arrays["heads/box_head/mlp/layers/2/bias"] = np.float32([-0.5, -0.5, -0.4, -0.4])  # near the rectangles
        arrays["heads/box_head/mlp/layers/2/kernel"] *= 0.2
        save_params(directory / "w", arrays, config_text(config), classes.to_json())
        return directory / "w"

    return store


@pytest.fixture
def behind_patches(monkeypatch):
    """Every detector that is built has mean pixels in the place of its ResNet."""
    monkeypatch.setattr("deperceiver_jax.models.detector.ResNet", Patches)


@pytest.fixture(scope="session")
def stored_detr(rectangles, store_detr):
    config = tiny_config()
    config.data.update(rectangles)
    config.data.eval_buckets = 1
    return store_detr(config, open_source(config.data, "validation").classes)


@pytest.fixture
def tiny_detr(stored_detr, behind_patches):
    return stored_detr

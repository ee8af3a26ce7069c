"""load_detector: what it reads, what it answers, and the sentence for a directory that is not a detector."""

import json
import shutil

import jax
import numpy as np
import pytest

from deperceiver_jax import UserError, load_detector
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.runs.stored_detector import find_detector, load_params, save_params
from deperceiver_jax.runs.workdir import read_config
from tests.drawn_arrays import abstract_detector


def arrays_of(detector):
    _, params, others = take_apart(detector)
    return jax.device_get({**params, **others})


@pytest.fixture
def workdir(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_workdir(workdir):
    """The latest step's moving average, which is 1.5 times its parameters; step 3 has the parameters themselves."""
    detector, config, classes = load_detector(workdir)
    assert config.to_dict() == read_config(workdir / "config.json").to_dict()
    assert classes.names == ("white", "green") and classes.num_slots == config.model.num_classes == 2
    averaged, plain = arrays_of(detector), arrays_of(load_detector(workdir, "best")[0])
    _, params, others = take_apart(abstract_detector(config))
    assert {path: x.shape for path, x in averaged.items()} == {
        path: x.shape for path, x in {**params, **others}.items()
    }
    for path in params:
        np.testing.assert_allclose(averaged[path], 1.5 * plain[path], rtol=1e-6)
    for path in others:
        np.testing.assert_array_equal(averaged[path], plain[path])


def test_a_checkpoint_step_and_an_import_are_the_same(workdir, tmp_path):
    text = [(workdir / name).read_text() for name in ("config.json", "classes.json")]
    save_params(tmp_path / "imported", load_params(find_detector(workdir, "7").items), *text)
    expected = arrays_of(load_detector(workdir)[0])
    for directory in (workdir / "checkpoints" / "7", tmp_path / "imported"):
        detector, _, classes = load_detector(str(directory))
        assert classes.category_ids == (20, 30)
        found = arrays_of(detector)
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array)


def change_config(workdir, **model):
    config = json.loads((workdir / "config.json").read_text())
    config["model"].update(model)
    (workdir / "config.json").write_text(json.dumps(config))


def break_classes(workdir):
    (workdir / "classes.json").write_text('{"classes": 3}')


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda w: shutil.rmtree(w), "is not a directory"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "has no checkpoint and no weights"),
        (lambda w: (w / "config.json").unlink(), "config.json does not exist"),
        (lambda w: (w / "classes.json").unlink(), "classes.json does not exist"),
        (break_classes, "classes.json is not a class map"),
        (
            lambda w: change_config(w, num_queries=6),
            r"another model: decoder/query_position is \(5, 32\) there and \(6",
        ),
        (lambda w: change_config(w, strides=[8, 16]), "another model: .* it lacks "),
    ],
)
def test_what_is_no_detector_is_refused(workdir, change, sentence):
    change(workdir)
    with pytest.raises(UserError, match=sentence):
        load_detector(workdir)

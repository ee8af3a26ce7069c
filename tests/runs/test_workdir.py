"""config.json and classes.json, and which command may continue a run."""

import pytest

from configs.deperceiver import get_config
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.workdir import check_workdir, read_config, write_workdir

CLASSES = ClassMap.from_categories([(3, "ant"), (7, "bee")])


@pytest.fixture
def written(tmp_path):
    write_workdir(tmp_path / "run", get_config("r50_multiscale"), CLASSES)
    return tmp_path / "run"


def test_the_config_comes_back_with_its_tuples(written):
    config = read_config(written / "config.json")
    assert config.to_dict() == get_config("r50_multiscale").to_dict()
    assert config.model.strides == (8, 16, 32) and isinstance(config.data.scales, tuple)
    assert ClassMap.from_json((written / "classes.json").read_text()) == CLASSES
    assert sorted(path.name for path in written.iterdir()) == ["classes.json", "config.json"]


def test_the_same_run_and_a_longer_one_may_continue(written, tmp_path):
    config = get_config("r50_multiscale")
    check_workdir(written, config, CLASSES)
    config.train.num_epochs, config.data.num_workers, config.mesh.model = 99, 0, 2
    check_workdir(written, config, CLASSES)
    check_workdir(tmp_path / "new", config, CLASSES)
    assert not (tmp_path / "new").exists()


def test_another_run_is_refused_by_what_differs(written):
    with pytest.raises(UserError, match=r"holds another run.*: model.strides \(\(8, 16, 32\), now \(16,\)\)\. Take"):
        check_workdir(written, get_config("r50_16"), CLASSES)
    config = get_config("r50_multiscale")
    config.seed, config.optimizer.learning_rate, config.data.flip_probability = 1, 0.5, 0.25
    with pytest.raises(UserError, match=r"flip_probability \(0.5, now 0.25\), optimizer.l.*0.5\), seed \(42, now 1\)"):
        check_workdir(written, config, CLASSES)
    other = ClassMap.from_categories([(3, "ant"), (7, "wasp")])
    with pytest.raises(UserError, match="wasp|bee"):
        check_workdir(written, get_config("r50_multiscale"), other)


def test_what_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a directory"):
        check_workdir(tmp_path / "file", get_config(), CLASSES)
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        write_workdir(tmp_path / "file" / "run", get_config(), CLASSES)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        check_workdir(tmp_path, get_config(), CLASSES)

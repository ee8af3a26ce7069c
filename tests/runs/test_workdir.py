"""config.json and classes.json, and which command may continue a run."""

import errno
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs.deperceiver import get_config
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.workdir import (
    check_data,
    check_workdir,
    data_fingerprint,
    keep_others_out,
    read_config,
    write_workdir,
)

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
    with pytest.raises(UserError, match="x cannot be used: File name too long."):
        check_workdir(tmp_path / ("x" * 300), get_config(), CLASSES)
    deep = tmp_path / "/".join(["d" * 200] * 19) / ("x" * (4000 - len(str(tmp_path)) - 19 * 201))
    with pytest.raises(UserError, match="x cannot be used: File name too long."):  # of what would lie in it
        check_workdir(deep, get_config(), CLASSES)


def hold(workdir, **how):
    with keep_others_out(workdir, **how):
        pass


def test_one_run_at_a_time(tmp_path):
    with keep_others_out(tmp_path / "run", new=True):
        with pytest.raises(UserError, match="--workdir: another run is at work in .*/run; take another one."):
            hold(tmp_path / "run")
    hold(tmp_path / "run")
    write_workdir(tmp_path / "run", get_config(), CLASSES)
    with pytest.raises(UserError, match="another run began in .* at the same time"):
        hold(tmp_path / "run", new=True)
    with pytest.raises(UserError, match="config.json cannot be written: (Not a directory|File exists)"):
        hold(tmp_path / "run" / "config.json")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    hold(tmp_path)
    assert capsys.readouterr().err.startswith(f"warning: nothing keeps a second run out of {tmp_path}: its file system")


def test_a_killed_run_leaves_no_lock(tmp_path, request):
    code = "import sys, time; from pathlib import Path; from deperceiver_jax.runs.workdir import keep_others_out\n"
    code += "with keep_others_out(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=request.config.rootpath) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run is at work"):
            hold(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    hold(tmp_path)


class Split:
    """Two images, the second one with a box."""

    def __init__(self, box=(1, 2, 3, 4), label=0, name="b.jpg", size=(9, 9)):
        self.sizes, self.name = np.array([(8, 8), size], np.int32), name
        self.box, self.label = np.array([box], np.float32), np.array([label], np.int32)

    def __len__(self):
        return 2

    def filename(self, position):
        return ("a.jpg", self.name)[position]

    def targets(self, position):
        return (self.box[:position], self.label[:position])


def test_data_that_changed_is_refused(tmp_path):
    data = data_fingerprint(Split())
    assert (data["images"], data["boxes"]) == (2, 1)
    check_data(tmp_path, data)  # nothing is noted
    write_workdir(tmp_path, get_config(), CLASSES, data)
    check_data(tmp_path, json.loads(json.dumps(data)))
    for other in (Split(box=(1, 2, 3, 5)), Split(label=1), Split(name="c.jpg"), Split(size=(9, 8))):
        with pytest.raises(UserError, match="2 images with 1 boxes then, as many, but other ones now. .*allow_changed"):
            check_data(tmp_path, data_fingerprint(other))
    with pytest.raises(UserError, match="2 images with 1 boxes then, 2 images with 7 boxes now."):
        check_data(tmp_path, data | {"boxes": 7})
    for garbage in ("", "[]", "{}", "7"):
        (tmp_path / "data.json").write_text(garbage)
        with pytest.raises(UserError, match="data.json cannot be read; without it"):
            check_data(tmp_path, data)

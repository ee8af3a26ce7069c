"""Flags, config files, stored configs and overrides; and the sentence that every mistake gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs.deperceiver import get_config
from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import parse_config, parse_flags, run, split_arguments
from deperceiver_jax.runs.workdir import read_config

CONFIG_FILE = "--config=configs/deperceiver.py:r50_16"


def define(values):
    flags.DEFINE_string("workdir", None, "The run.", flag_values=values)
    flags.DEFINE_integer("number", 3, "A number.", flag_values=values)


def parse(*arguments, stored=None):
    values, rest = parse_flags(["program", *arguments], define, "What it does.")
    return values, parse_config(rest, stored)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(get_config("r50_multiscale").to_json())
    return read_config(path)


def test_config_file_and_overrides():
    values, config = parse(CONFIG_FILE, "--workdir=runs/x", "--config.data.batch_size=7", "--config.data.scales=(1,2)")
    assert values.workdir == "runs/x" and values.number == 3
    expected = get_config("r50_16")
    expected.data.batch_size, expected.data.scales = 7, (1, 2)
    assert config.to_dict() == expected.to_dict()
    with pytest.raises(AttributeError):
        config.data.new_field = 1


def test_stored_config_is_the_config_that_was_stored(stored):
    assert stored.to_dict() == get_config("r50_multiscale").to_dict()
    _, config = parse("--config.eval.max_detections=300", "--config.model.strides=(8,)", stored=stored)
    assert config.eval.max_detections == 300 and config.model.strides == (8,)
    assert stored.eval.max_detections == 100


def test_a_config_file_wins_over_the_stored_config(stored):
    _, config = parse(CONFIG_FILE, "--noconfig.data.skip_corrupt", stored=stored)
    assert config.model.strides == (16,) and config.data.skip_corrupt is False


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.data.batchsize=3"], "The config has no field data.batchsize; the nearest is data.batch_size."),
        (["--config.clip_norm=3"], "The config has no field clip_norm; the nearest is optimizer.clip_norm."),
        (["--config.data.batch_size=many"], "flag --config.data.batch_size=many: invalid literal for int"),
        (["--work=3"], "There is no flag --work; the nearest is --workdir."),
        (["runs/x"], "runs/x belongs to no flag."),
        (["--number=three"], "flag --number=three: invalid literal for int"),
        (["--config.data.skip_corrupt"], "--config.data.skip_corrupt needs a value"),
        (["--config"], "--config needs a value"),
        (["--config=configs/none.py:r50"], "--config: configs/none.py does not exist."),
        (["--config=configs/deperceiver.py:r50_17"], "configs/deperceiver.py has no variant 'r50_17'; it has r50_32,"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, stored, capsys):
    assert run(lambda argv: parse(*argv[1:], stored=stored), ["program", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: " + sentence)
    assert printed.count("\n") == 1 and "Traceback" not in printed


def test_the_last_of_repeated_flags_counts():
    """Of every kind of field: a tuple's values do not add up."""
    _, config = parse(
        CONFIG_FILE,
        "--config.optimizer.drop_epochs=(40,)",
        "--config.optimizer.drop_epochs=(50,)",
        "--config.data.scales=(1,2)",
        "--config.data.scales=()",
        "--config.seed=1",
        "--config.data.skip_corrupt=True",
        "--config.seed=2",
        "--noconfig.data.skip_corrupt",
        "--config.optimizer.groups.rest.pattern=a",
        "--config.optimizer.groups.rest.pattern=b",
    )
    assert config.optimizer.drop_epochs == (50,) and config.data.scales == () and config.seed == 2
    assert config.data.skip_corrupt is False and config.optimizer.groups.rest.pattern == "b"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.data.scales=480-800"], "config.data.scales is ('480-800',); it is to be like (480, 512, "),
        (["--config.optimizer.drop_epochs=none"], "config.optimizer.drop_epochs is ('none',); it is to be like (33,)."),
        (["--config.model.strides=(1.5,)"], "config.model.strides is (1.5,); it is to be like (16,)."),
        (["--config.data={}"], "The config lacks data."),
        (["--config.data.directory=s3://bucket/coco"], "config.data.directory is s3://bucket/coco: of addresses with"),
        (
            ["--config.data.prepared_directory=gs://bucket/coco"],
            "config.data.prepared_directory is gs://bucket/coco: it is read from a d",
        ),
        (["--workdir=file:///x"], "--workdir is file:///x: of addresses with :// only gs:// is known"),
        (["--workdir=~nobody_is_called_so/x"], "--workdir is ~nobody_is_called_so/x: there is no such home directory."),
        (["--config.init_from=~nobody_is_called_so"], "config.init_from is ~nobody_is_called_so: there is no such"),
        (["--workdir=x\udcff"], r"--workdir is 'x\udcff': its bytes are no UTF-8."),
    ],
)
def test_texts_that_no_path_or_tuple_can_be(arguments, sentence, capsys):
    assert run(lambda argv: parse(*argv[1:]), ["program", CONFIG_FILE, *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: " + sentence) and printed.count("\n") == 1


def test_without_a_home_directory_there_is_another(monkeypatch, tmp_path, capsys):
    """As with docker --user and no entry in /etc/passwd. monkeypatch brings the old one back."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    assert run(lambda argv: seen.append(Path("~/.cache").expanduser()), ["program"]) == 0
    (home,) = tmp_path.iterdir()
    assert seen == [home / ".cache"]
    assert capsys.readouterr().err == f"warning: there is no home directory (HOME is not set); ~ is {home} now.\n"

    monkeypatch.delenv("HOME")
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    home.rename(tmp_path / f"deperceiver_jax_{os.getuid()}")
    assert run(lambda argv: None, ["program"]) == 1
    assert "is another user's: set HOME." in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_sentence(platform):
    """A process of its own: JAX looks for its devices once."""
    code = (
        "import sys, jax; from deperceiver_jax.program.command_line import run; sys.exit(run(lambda _: jax.devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: JAX_PLATFORMS is {platform}, which JAX cannot use here: no such device")
    assert done.stderr.count("\n") == 1


def test_a_config_is_needed():
    with pytest.raises(UserError, match="--config is missing"):
        parse("--workdir=x")


def test_help_shows_the_flags(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "What it does." in printed and "--workdir" in printed and "The run." in printed


def test_unreadable_stored_configs(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"seed": 4')
    with pytest.raises(UserError, match="is not a stored config"):
        read_config(tmp_path / "config.json")


def test_other_errors_are_not_hidden():
    def broken(argv):
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault"):
        run(broken, ["program"])


def test_a_flag_of_several_values_takes_what_a_shell_makes_of_a_pattern():
    def define_several(values):
        flags.DEFINE_multi_string("images", [], "Some.", flag_values=values)
        flags.DEFINE_string("output", None, "One.", flag_values=values)

    arguments = ["--images", "a", "b", "-", "--output", "out", "--images=c", "d", "--config.seed=3"]
    values, rest = parse_flags(["program", *arguments], define_several, "")
    assert values.images == ["a", "b", "-", "c", "d"] and values.output == "out" and rest[1:] == ["--config.seed=3"]
    for wrong, sentence in (
        (["--output=out", "c"], "c belongs to no flag"),
        (["--images", "a", "s3://b"], "addresses with ://"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_flags(["program", *wrong], define_several, "")


def test_places_beside_flags_whose_values_may_follow():
    def define(values):
        flags.DEFINE_string("output", None, "", flag_values=values)
        flags.DEFINE_bool("decode", False, "", flag_values=values)

    arguments = ["a", "--output", "x.png", "--decode", "b", "--output=y.png", "c", "--config", "demo", "--odd"]
    places, others = split_arguments(arguments, define)
    assert places == ["a", "b", "c"]
    assert others == ["--output=x.png", "--decode", "--output=y.png", "--config=demo", "--odd"]
    with pytest.raises(UserError, match="photo.jpg belongs to no flag; --images=photo.jpg would name a picture."):
        parse_flags(["x", "photo.jpg"], lambda v: flags.DEFINE_multi_string("images", None, "", flag_values=v), "")

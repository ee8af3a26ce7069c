"""The installed command: its list, its help, names that are not quite right, and the wheel that brings it."""

import os
import shutil
import subprocess
import sys

import pytest

from deperceiver_jax import __main__ as program
from deperceiver_jax import __version__
from deperceiver_jax.program.command_line import parse_config, run


def deperceiver(*arguments):
    return run(program.main, ["deperceiver", *map(str, arguments)])


def in_process_of_its_own(root, code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_list_has_every_command(capsys, arguments):
    assert deperceiver(*arguments) == 0
    printed = capsys.readouterr().out
    listed = [line.split()[0] for line in printed.partition("commands:")[2].splitlines() if line[2:3].strip()]
    assert listed[:3] == ["predict", "train", "eval"] and listed == list(program.find_commands())
    assert {"export-weights", "import-weights", "preflight", "visualize"} <= set(listed)


def test_the_version(capsys):
    assert deperceiver("--version") == 0
    assert capsys.readouterr().out == f"deperceiver_jax {__version__}\n"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["trian"], "There is no command trian; the nearest is train; deperceiver --help lists them."),
        (["import_weight"], "There is no command import_weight; the nearest is import-weights; deperceiver --help"),
        (["zzz"], "There is no command zzz; deperceiver --help lists them."),
        (["predict"], "--images is needed"),
        (["eval", "--splt=x"], "There is no flag --splt; the nearest is --split."),
        (
            ["train", "--workdir=x", "--config=dter:r50"],
            "--config: there is no config dter; the nearest is detr; ",
        ),
        (["train", "--workdir=x", "--config=detr:r5"], "configs/detr.py has no variant 'r5'; it has r50, "),
        (["train", "--workdir=x", "--config=mine/detr.py"], "--config: mine/detr.py does not exist."),
    ],
)
def test_what_is_not_quite_right_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert deperceiver(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}") and error.count("\n") == 1


def test_a_shipped_config_by_name_or_path_from_anywhere(tmp_path, monkeypatch):
    """Also beside a folder of somebody's own that is called configs too."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("raise RuntimeError('another configs')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    named, placed = (parse_config(["train", f"--config={name}:r101"]) for name in ("detr", "configs/detr.py"))
    assert named.to_dict() == placed.to_dict() and named.model.backbone.depth == 101


def test_a_config_file_of_ones_own_starts_from_what_is_shipped(tmp_path):
    text = "from configs.detr import get_config as detr\n\n\ndef get_config():\n    return detr('r50_dc5')\n"
    (tmp_path / "mine.py").write_text(text)
    assert parse_config(["train", f"--config={tmp_path}/mine.py"]).model.strides == (16,)


@pytest.mark.slow
def test_help_texts_start_no_jax(request):
    """Of every command, without importing what it would run with."""
    code = (
        "import contextlib, sys\n"
        "from deperceiver_jax.__main__ import find_commands, main\n"
        "for command in find_commands():\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(['deperceiver', command, '--help'])\n"
        "    if 'jax' in sys.modules:\n"
        "        sys.exit(f'{command} imports jax')\n"
    )
    done = in_process_of_its_own(request.config.rootpath, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("flags:") >= 6 and "--score_threshold=THRESHOLD" in done.stdout


@pytest.mark.slow
def test_the_wheel_brings_command_and_configs(request, tiny_run, tmp_path):
    """Built from a copy of what is in the repository, installed and used far from it."""
    root, source = request.config.rootpath, tmp_path / "source"
    for name in ("deperceiver_jax", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    wheel, site = next(tmp_path.glob("deperceiver_jax-*.whl")), tmp_path / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=300)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}

    def installed(*arguments):
        command = [site / "bin" / "deperceiver", *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)

    assert "import-weights" in installed("--help").stdout
    refused = installed("train", "--config=detr:r5", "--workdir=x")
    assert refused.returncode == 1 and "it has r50, " in refused.stderr
    photo = next((root / "docs").glob("*.jpg"))
    found = installed("predict", f"--workdir={tiny_run}", f"--images={photo}", "--output=out", "--score_threshold=0")
    assert found.returncode == 0, found.stderr
    assert (elsewhere / "out" / photo.name).is_file() and (elsewhere / "out" / "detections.json").is_file()
    where = "import deperceiver_jax; print(deperceiver_jax.__file__)"
    assert in_process_of_its_own(elsewhere, where, env=environment).stdout.startswith(str(site))

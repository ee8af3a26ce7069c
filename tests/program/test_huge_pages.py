"""Programs start again where that gives them huge pages, once, with their arguments; and nowhere else."""

import json
import os
import subprocess
import sys

import pytest

from deperceiver_jax.program import huge_pages
from deperceiver_jax.program.huge_pages import TUNABLES, with_huge_pages

ASKED = {TUNABLES: "glibc.malloc.hugetlb=1"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Describes one on which programs have to ask for huge pages, and has no accelerator."""

    def describe(*, pages="always [madvise] never", library=("glibc", "2.36"), devices=(), system="linux"):
        file = tmp_path / "enabled"
        file.write_text(pages)
        monkeypatch.setattr(huge_pages, "TRANSPARENT", file)
        monkeypatch.setattr("platform.libc_ver", lambda: library)
        monkeypatch.setattr(huge_pages, "ACCELERATORS", [str(tmp_path / name) for name in ("accel[0-9]*", "kfd")])
        monkeypatch.setattr(sys, "platform", system)
        for name in devices:
            (tmp_path / name).touch()

    describe()
    return describe


def test_a_cpu_whose_system_gives_huge_pages_on_request(machine):
    assert with_huge_pages({"HOME": "/x"}) == {"HOME": "/x", **ASKED}
    assert with_huge_pages({"JAX_PLATFORMS": "cpu"}) == {"JAX_PLATFORMS": "cpu", **ASKED}
    others = {TUNABLES: "glibc.malloc.trim_threshold=9"}
    assert with_huge_pages(others) == {TUNABLES: "glibc.malloc.trim_threshold=9:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("value", ["0", "1", "2"])
def test_who_has_chosen_is_left_alone(machine, value):
    assert with_huge_pages({TUNABLES: f"glibc.malloc.check=0:glibc.malloc.hugetlb={value}"}) is None


@pytest.mark.parametrize(
    "description",
    [
        {"pages": "[always] madvise never"},
        {"pages": "always madvise [never]"},
        {"library": ("glibc", "2.34")},
        {"library": ("", "")},
        {"system": "darwin"},
        {"devices": ["accel0"]},
        {"devices": ["kfd"]},
    ],
)
def test_where_nothing_would_change(machine, description):
    machine(**description)
    assert with_huge_pages({}) is None


def test_jax_platforms_say_more_than_devices(machine):
    machine(devices=["accel0"])
    assert with_huge_pages({"JAX_PLATFORMS": "cpu,tpu"}) is not None
    machine()
    assert with_huge_pages({"JAX_PLATFORMS": "cuda,cpu"}) is None


def test_a_system_without_such_pages(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "TRANSPARENT", tmp_path / "nothing")
    assert with_huge_pages({}) is None


def test_the_program_starts_again_once_as_it_was(tmp_path):
    """The process and its arguments, Python's own among them, stay; what a machine without such pages does as well."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "from deperceiver_jax.program.huge_pages import use_huge_pages\n"
        "print('begun', flush=True)\n"
        "use_huge_pages()\n"
        "print(json.dumps([os.getpid(), sys.argv[1:], sys.warnoptions, os.environ.get('GLIBC_TUNABLES')]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(program), "a b", "--c='d'"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    expected = with_huge_pages(environment)
    lines = out.splitlines()
    assert process.returncode == 0 and lines[:-1] == ["begun"] * (2 if expected else 1)
    tunables = expected[TUNABLES] if expected else None
    assert json.loads(lines[-1]) == [process.pid, ["a b", "--c='d'"], ["error"], tunables]

"""Imports point down only, so every room can be read without the rooms above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deperceiver_jax"

FOUNDATION = {"structures", "boxes", "images", "sharding", "errors"}
# What each room may import of the package besides itself; a room that is not here is a program, which may use all.
ROOMS = {
    **{name: {"errors"} for name in FOUNDATION},
    "models": FOUNDATION,
    "losses": FOUNDATION,
    "data": FOUNDATION,
    "weights": FOUNDATION | {"models"},
    "evaluation": FOUNDATION | {"models", "losses", "data"},
    "training": FOUNDATION | {"models", "losses", "data", "weights", "evaluation"},
}
# Of programs; used by nothing below them.
LIBRARY = {"command_line", "compilation_cache", "load", "process_watch", "processes"}
PROGRAMS = {"import_weights", "export_weights", "preflight", "visualize", "benchmark"}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    return module.removeprefix("deperceiver_jax").removeprefix(".").split(".")[0]


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_below_it(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(path)
    rooms = {room_of(name) for name in names if name.startswith("deperceiver_jax.")} - {own, ""}
    known = set(ROOMS) | LIBRARY | PROGRAMS
    assert rooms <= known, f"{path} imports an unknown room"
    assert not any(name.split(".")[0] in ("configs", "train", "eval", "predict", "tests") for name in names)
    if own in ROOMS:
        assert rooms <= ROOMS[own], f"{path} looks up or sideways: {rooms - ROOMS[own]}"
    else:
        assert own in LIBRARY | PROGRAMS, f"{path} is a room that the house does not list"


def test_only_the_weights_room_knows_pytorch():
    for path in files():
        if path.relative_to(PACKAGE).parts[0] != "weights":
            assert not any(name.split(".")[0] in ("torch", "torchvision") for name in imported(path)), path


@pytest.mark.parametrize("module", ["jax", "tensorflow"])
def test_data_rooms_compute_without_it(module):
    code = f"import sys, deperceiver_jax.data; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_room_without_a_purpose():
    assert not [p for p in files() if p.stem in ("utils", "util", "misc", "common", "helpers")]

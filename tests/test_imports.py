"""Imports point down only, so every room can be read without the rooms above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deperceiver_jax"

FOUNDATION = {"structures", "boxes", "images", "sharding", "errors", "files", "field_needs", ""}
LIBRARY = {"models", "data", "program", *FOUNDATION}
KEEPERS = {"runs", "losses", "weights"}
# What each room may import of the package besides itself.
ROOMS = {
    **{name: {"errors"} for name in FOUNDATION},
    **dict.fromkeys(("models", "data", "program"), FOUNDATION),
    "runs": LIBRARY | {"weights"},  # what others have published
    "losses": FOUNDATION,
    "weights": FOUNDATION | {"models"},
    "evaluation": LIBRARY | KEEPERS,
    "export": LIBRARY | KEEPERS | {"evaluation"},  # it compares APs
    "pages": FOUNDATION,  # what the report, the comparison and the app share
    "report": LIBRARY | KEEPERS | {"evaluation", "pages"},
    "compare": LIBRARY | KEEPERS | {"evaluation", "report", "pages"},
    "visualize": LIBRARY | KEEPERS | {"evaluation", "report", "compare"},  # charts, and rows to compare
    "training": LIBRARY | KEEPERS | {"evaluation", "visualize"},  # pictures for trackers
    # It compiles the step that a training run takes, and traces that of its evaluations.
    "preflight": LIBRARY | KEEPERS | {"training", "evaluation"},
    "prediction": LIBRARY | KEEPERS | {"evaluation", "visualize"},
    "app": LIBRARY | KEEPERS | {"prediction", "visualize", "pages"},
}
PROGRAMS = {"train", "eval", "predict", "import_weights", "export_weights"}  # and every __main__.py
CLONE = ("train.py", "eval.py", "predict.py")  # of which these are the doors
FAMILIES = {"detr", "deperceiver", "deperceiver_plus", "deformable_detr", "smca"}
# The floors of models/: a room may import those named, and its own.
FLOORS = {
    "kernels": set(),
    "layers": {"kernels"},
    "features": {"kernels", "layers"},
    "attention": {"kernels", "layers"},
    "heads": {"kernels", "layers", "features"},
    "skeleton": set(),
    "config_section": set(),
    "detector": {"config_section", "features", "layers"},
}
FLOORS |= {family: {*FLOORS, *({"detr"} if family == "smca" else ())} for family in FAMILIES}
FLOORS["__init__"] = set(FLOORS)


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
    return names


def rooms_of(names: set[str], above: str) -> set[str]:
    """The first step below `above` of each name that lies there."""
    inside = [name.removeprefix(above).removeprefix(".") for name in names if (name + ".").startswith(above + ".")]
    return {name.split(".")[0] for name in inside}


def files(room: str = ""):
    return sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_below_it(path):
    names = imported(path)
    assert not any(name.split(".")[0] in ("configs", "train", "eval", "predict", "tests") for name in names)
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix("__init__")
    rooms = rooms_of(names, "deperceiver_jax") - {own}
    if own in PROGRAMS or path.name == "__main__.py":
        assert not rooms & PROGRAMS, f"{path} imports a program"
    else:
        assert own in ROOMS, f"{path} is a room that the house does not list"
        assert rooms <= ROOMS[own], f"{path} looks up or sideways: {rooms - ROOMS[own]}"


@pytest.mark.parametrize("path", files("models"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_models_have_floors(path):
    """kernels < layers < features, attention < heads < families, and no family imports another but smca detr."""
    own = path.relative_to(PACKAGE / "models").parts[0].removesuffix(".py")
    rooms = rooms_of(imported(path), "deperceiver_jax.models") - {own}
    assert rooms <= FLOORS[own], f"{path} looks up or sideways: {rooms - FLOORS[own]}"


def test_nothing_imports_a_program():
    for path in [*files(), *ROOT.glob("*.py")]:
        names = imported(path)
        assert not any(name.split(".")[-1] == "__main__" for name in names), path
        assert not rooms_of(names, "deperceiver_jax") & PROGRAMS or path.name in CLONE and path.parent == ROOT, path


def test_only_build_assembles_a_training_step():
    """From a config: train.py, preflight, the benchmarks and the tests get it from training/build.py."""
    parts = {"make_train_step", "plan_train_state"}
    assembled = set()
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "tests", ROOT / "configs"):
        for path in folder.rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if parts & {getattr(node.func, "id", getattr(node.func, "attr", "")) for node in calls}:
                assembled.add(path.relative_to(ROOT).as_posix())
    assert assembled == {"deperceiver_jax/training/build.py"}


def test_only_the_weights_room_knows_pytorch():
    for path in files():
        if path.relative_to(PACKAGE).parts[0] != "weights":
            assert not any(name.split(".")[0] in ("torch", "torchvision") for name in imported(path)), path


@pytest.mark.parametrize("module", ["jax", "tensorflow"])
def test_data_rooms_compute_without_it(module):
    code = f"import sys, deperceiver_jax.data; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_commands_of_a_clone_are_the_packages():
    for name in CLONE:
        assert f"deperceiver_jax.{name.removesuffix('.py')}" in imported(ROOT / name)


def test_no_room_without_a_purpose():
    assert not [p for p in files() if p.stem in ("utils", "util", "misc", "common", "helpers")]


def test_constructors_take_about_ten_parameters():
    """Of modules; a dataclass of a config section has as many fields as the section."""
    for path in files("models"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                assert count <= 11, f"{path}:{node.lineno} has {count}"

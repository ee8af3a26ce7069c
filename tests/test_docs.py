"""The documentation is true: its commands, fields, variants, files and links exist, and its code runs."""

import ast
import functools
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import deperceiver_jax.models
from benchmarks import real_objects
from configs import ladder
from deperceiver_jax.__main__ import find_commands
from deperceiver_jax.errors import UserError
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models import DETECTORS, abstract_detector, field_needs
from deperceiver_jax.program.command_line import has_config_file, parse_config, parse_flags
from deperceiver_jax.runs.workdir import flat_fields
from deperceiver_jax.sharding import make_mesh, shard_batch
from deperceiver_jax.training.build import build_training
from tests.devices import global_batch
from tests.drawn_arrays import Patches
from tests.unwritten_configs import configs_are_not_written  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deperceiver_jax"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TOY = "one_look"  # the detector of docs/add_a_detector.md, which is in no file but that page
FAMILIES = ("deperceiver", "deperceiver_plus", "detr", "deformable_detr", "smca")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLED = "|".join(find_commands())
PROGRAM = re.compile(rf"(?:^|\s)(?:python (-m [\w.]+|[\w/]+\.py)|(deperceiver (?:{INSTALLED})))(?=\s|$)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ------------------------------------------------------------------------------------------------------ what is read


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind; commands have none."""
    return [body for info, body in FENCE.findall(page.read_text()) if info.strip() == kind]


def spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))]


def lines_of_commands(page: Path) -> list[str]:
    """Lines of command blocks, continuations joined, and spans that are a command."""
    joined = [line for body in blocks(page, "") for line in body.replace("\\\n", "").splitlines()]
    return [line.removeprefix("$ ") for line in joined] + [span for span in spans(page) if PROGRAM.match(span)]


class Command(NamedTuple):
    """`python program arguments`, without placeholders (... and FLAG=...) and the brackets of what may be left out."""

    program: str
    arguments: list[str]


def commands(page: Path) -> Iterator[Command]:
    for line in lines_of_commands(page):
        line = re.sub(r'--command="([^"]*)"', r"\1", line)
        if found := PROGRAM.search(line):
            rest = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line[found.end() :]), comments=True)
            yield Command(found[1] or found[2], [token for token in rest if not token.endswith("...")])


@functools.cache
def all_configs() -> tuple[ConfigDict, ...]:
    """Of every variant of every family."""
    modules = [importlib.import_module(f"configs.{family}") for family in FAMILIES]
    return tuple(module.get_config(variant) for module in modules for variant in module.VARIANTS)


@functools.cache
def all_fields() -> frozenset[str]:
    """Fields and sections of all these configs."""
    fields = {name for config in all_configs() for name in flat_fields(config)}
    return frozenset(fields | {name.rpartition(".")[0] for name in fields})


def accepted_by_some_family(overrides: list[str]) -> bool:
    """Whether one config has all of these fields, takes these values, and lets them have an effect."""

    def accepts(config):
        try:
            return bool(parse_config(["docs", *overrides], config, needs=field_needs))
        except UserError:
            return False

    return any(map(accepts, all_configs()))


def package_program(program: str, arguments: list[str]):
    """(module with `define_flags`, its arguments) of train.py, eval.py, predict.py and the package's programs."""
    name = program.removeprefix("-m ").removeprefix("deperceiver ").removesuffix(".py").replace("-", "_")
    module = importlib.import_module(name if name.startswith("deperceiver_jax") else f"deperceiver_jax.{name}")
    if module.__name__ == "deperceiver_jax.visualize":
        return importlib.import_module(f"{module.__name__}.{arguments[0]}"), arguments[1:]
    if module.__name__ == "deperceiver_jax.data":
        arguments = arguments[2:]  # after what to do and with which folder
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    return module, arguments


def flags_in_source(path: Path) -> set[str]:
    """The flags that a program of benchmarks/ or tests/ defines, with absl or argparse."""
    return set(re.findall(r'(?:add_argument|DEFINE_\w+)\(\s*"(?:--)?(\w+)"', path.read_text()))


# ---------------------------------------------------------------------------------------------------------- commands


def check_package_program(command: Command) -> None:
    module, arguments = package_program(*command)
    if hasattr(module, "split_arguments"):  # it takes folders besides flags
        _, arguments = module.split_arguments(arguments, module.define_flags)
    _, rest = parse_flags(["docs", *arguments], module.define_flags, "")
    if has_config_file(rest):
        parse_config(rest, needs=field_needs)
    elif rest[1:]:
        assert accepted_by_some_family(rest[1:]), rest[1:]


def check_other_program(command: Command) -> None:
    """A benchmark or a program of tests/. Its overrides are checked for the configs or rows that it names."""
    path = ROOT / f"{command.program.removeprefix('-m ').replace('.', '/').removesuffix('/py')}.py"
    assert path.is_file(), path
    flags = [argument for argument in command.arguments if argument.startswith("--")]
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    values = dict(flag[2:].partition("=")[::2] for flag in flags if flag not in overrides)
    takes_a_file = {"config"} if "parse_config" in path.read_text() else set()
    assert set(values) <= flags_in_source(path) | takes_a_file, set(values) - flags_in_source(path)
    rows = values.get("rows", "").split(",") if path.stem == "small_objects" else []
    named = [f"configs/ladder.py:{row}" for row in rows if row]
    named += [name for flag in ("config", "configs") for name in values.get(flag, "").split(",") if name]
    for name in named:
        parse_config(["docs", f"--config={name}", *overrides], needs=field_needs)
    assert named or not overrides or accepted_by_some_family(overrides), overrides


@every_page
def test_commands_are_accepted(page):
    """The program exists and knows every flag; every override is taken by the config that the command names."""
    for command in commands(page):
        if any(TOY in argument for argument in command.arguments):
            continue  # test_toy_commands
        ours = "/" not in command.program and not command.program.startswith("-m tests.")
        try:
            (check_package_program if ours else check_other_program)(command)
        except (UserError, AssertionError) as error:
            raise AssertionError(f"{name_of(page)}: python {command.program} {command.arguments}: {error}") from error


def test_no_command_trains_behind_a_random_backbone():
    """Of the pages and the config files: each has a config that names weights or trains its backbone from nothing."""
    lines = [
        shlex.join(command.arguments) for page in PAGES for command in commands(page) if command.program == "train.py"
    ]
    texts = [path.read_text().replace("\\\n", "") for path in (ROOT / "configs").glob("*.py")]
    lines += [line for text in texts for line in text.splitlines() if "python train.py" in line]
    found = [line for line in lines if re.search(r"--config=configs/", line)]
    assert len(found) > 15
    for line in found:
        name, variant = re.search(r"--config=configs/(\w+)\.py(?::(\w+))?", line).groups()
        if name != TOY:
            config = importlib.import_module(f"configs.{name}").get_config(*[variant] if variant else [])
            backbone = config.model.backbone
            name = f"resnet{backbone.depth}" if backbone.groups == 1 else f"resnext{backbone.depth}_64x4d"
            named = backbone.weights == f"hf://timm/{name}.tv_in1k"
            assert named or (backbone.norm, backbone.frozen_stages) == ("group_norm", 0), line


def test_there_are_commands():
    """So that the test above reads what it shall."""
    found = {name_of(page): len(list(commands(page))) for page in PAGES}
    assert found["README.md"] >= 6 and found["docs/finetuning.md"] >= 10 and sum(found.values()) > 50, found


@every_page
def test_make_targets_and_extras_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = [line for body in blocks(page, "") for line in body.splitlines()] + spans(page)
    for line in code:
        if line.startswith("make "):
            words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
            assert set(words) <= targets, line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", page.read_text())) <= set(extras)


@every_page
def test_fields_and_variants_exist(page):
    """Overrides in running text are accepted by some family, fields are some config's, variants their file's."""
    for span in spans(page):
        parts = [part for part in shlex.split(span) if part.startswith("--config")] if span.startswith("--") else []
        files = [part for part in parts if part.startswith("--config=")]
        overrides = [part for part in parts if re.match(r"--config\.[a-z].*=", part) and not part.endswith("=...")]
        if files:
            parse_config(["docs", *files, *overrides], needs=field_needs)
        else:
            assert not overrides or accepted_by_some_family(overrides), span
        for field in re.findall(r"(?<![\w-])config\.([a-z][\w.]*\w)", span):
            assert field in all_fields() | {"json"}, f"config.{field}"
    for file, variant in re.findall(r"(?<![\w.-])(?:configs/)?(\w+)\.py:(\w+)", page.read_text()):
        if file != TOY:
            assert variant in importlib.import_module(f"configs.{file}").VARIANTS, f"{file}.py:{variant}"


@every_page
def test_rows_of_benchmarks_exist(page):
    known = {"small_objects": ladder.VARIANTS, "real_objects": real_objects.ROWS}
    text = page.read_text().replace("\\\n", "")
    for benchmark, rows in re.findall(r"(small_objects|real_objects)\.py[^\n`]*?--rows=([\w,]+)", text):
        assert set(rows.split(",")) <= set(known[benchmark]), rows


# ------------------------------------------------------------------------------------------------- links and files


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    """Python files with a folder, from the repository's root or the package's."""
    for path in re.findall(r"(?<![\w./~-])(\w+(?:/\w+)+\.py)\b", page.read_text()):
        if TOY not in path:
            assert (ROOT / path).is_file() or (PACKAGE / path).is_file(), path


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", index.read_text())}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs") and page != index} <= linked


def test_names_in_the_drawings_exist():
    """A node of a drawing in architecture.md names a file, and below it what is in it."""
    drawings = "\n".join(blocks(ROOT / "docs" / "architecture.md", "mermaid"))
    found = re.findall(r"([\w/]+\.py)<br>([\w., ]+)", drawings)
    assert len(found) > 15
    for file, names in found:
        path = ROOT / file if (ROOT / file).is_file() else PACKAGE / file
        tree = ast.parse(path.read_text())
        known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(names.replace(".", ", ").split(", ")) <= known, f"{file}: {names}"


@every_page
def test_python_names_exist(page):
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and TOY not in node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_a_detector_explains_every_field(family):
    """Of config.model in its file, by its name in it; the backbone's are the same for all."""
    told = set(spans(ROOT / "docs" / f"{family}.md"))
    fields = {
        name.removeprefix("model.")
        for name in flat_fields(importlib.import_module(f"configs.{family}").get_config())
        if name.startswith("model.") and not name.startswith("model.backbone")
    }
    assert fields - {"name", "num_classes"} <= told, fields - told


# ----------------------------------------------------------------------------------------- the toy of add_a_detector


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The config file of docs/add_a_detector.md; its detector is in DETECTORS, and both come from the page alone."""
    page = ROOT / "docs" / "add_a_detector.md"
    files = {}
    for body in blocks(page, "python"):
        path, _, code = body.removeprefix("# ").partition("\n")
        files[path] = tmp_path / path
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].write_text(code)
    assert set(files) == {f"deperceiver_jax/models/{TOY}/{TOY}.py", f"configs/{TOY}.py"}
    folder = tmp_path / "deperceiver_jax" / "models"
    (folder / TOY / "__init__.py").touch()
    monkeypatch.setattr(deperceiver_jax.models, "__path__", [*deperceiver_jax.models.__path__, str(folder)])
    added = [line[1:].strip() for line in blocks(page, "diff")[0].splitlines() if line.startswith("+")]
    names = {}
    exec(added[0], names)  # the import
    for name, detector in eval(f"{{{added[1]}}}", names).items():
        monkeypatch.setitem(DETECTORS, name, detector)
    yield files[f"configs/{TOY}.py"]
    for name in [name for name in sys.modules if f".{TOY}" in name]:
        del sys.modules[name]
    if hasattr(deperceiver_jax.models, TOY):
        delattr(deperceiver_jax.models, TOY)


def toy_config(file: Path) -> ConfigDict:
    fields = ["--config.model.backbone.width=8", "--config.data.batch_size=8", "--config.matcher.backend=device"]
    config = parse_config(["docs", f"--config={file}:small", *fields], needs=field_needs)
    config.model.num_classes = 4
    return config


@pytest.mark.slow
def test_toy_answers_and_learns(toy, monkeypatch):
    """A forward pass on small images, and one step of training, in which everything behind mean pixels moves."""
    monkeypatch.setattr("deperceiver_jax.models.detector.ResNet", Patches)
    config, batch = toy_config(toy), global_batch()
    detector = abstract_detector(config)
    assert type(detector) is DETECTORS[TOY]
    mesh = make_mesh(devices=jax.devices()[:1])
    training = build_training(config, mesh, steps_per_epoch=10, num_steps=100)
    state = training.plan.initialize()

    detector = training.plan.skeleton.merge({**state.params, **state.frozen})
    predictions = jax.jit(lambda *images: detector(*normalize_images(*images)))(batch.image[:2], batch.size[:2])
    assert predictions.logits.shape == (1, 2, config.model.num_queries, 5)
    assert predictions.boxes.shape == (1, 2, config.model.num_queries, 4)
    assert float(predictions.boxes.min()) > 0 and float(predictions.boxes.max()) < 1

    before = jax.tree.map(np.asarray, state.params)
    state, metrics = training.step(state, shard_batch(batch, mesh))
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"])) and metrics["num_boxes"] == 12
    still = [path for path in state.params if np.array_equal(state.params[path], before[path])]
    assert before and not still


def test_toy_commands(toy):
    """The page's commands name variants that there are, and a field without effect is refused as the page says."""
    page = ROOT / "docs" / "add_a_detector.md"
    found = [command for command in commands(page) if any(TOY in argument for argument in command.arguments)]
    assert len(found) >= 4
    for program, arguments in found:
        arguments = [argument.replace(f"configs/{TOY}.py", str(toy)) for argument in arguments]
        check_package_program(Command(program, arguments))
    with pytest.raises(UserError, match="model.self_heads has no effect"):
        override = ["--config.model.self_attention=False", "--config.model.self_heads=2"]
        parse_config(["docs", f"--config={toy}:r50", *override], needs=field_needs)
    with pytest.raises(UserError, match="loss.auxiliary has no effect"):
        parse_config(["docs", f"--config={toy}:r50", "--config.loss.auxiliary=False"], needs=field_needs)

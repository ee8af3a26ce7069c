"""Every config file and variant builds its detector; parameters all fit the optimiser's groups."""

import importlib
import math
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.models import field_needs
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.training.optimizer import group_multipliers
from tests.drawn_arrays import abstract_detector
from tests.meshes import mesh_on

FILES = ("deperceiver", "deperceiver_plus", "detr", "deformable_detr", "smca", "demo", "ladder", "small")


def models():
    """(file, variant) of every model; variants that differ in their schedule alone have one."""
    found = {}
    for name in FILES:
        module = importlib.import_module(f"configs.{name}")
        for variant in module.VARIANTS:
            found.setdefault(module.get_config(variant).model.to_json(), (name, variant))
    return found.values()


FEATURES: dict[tuple, dict] = {}  # shapes of what a backbone gives, by what they depend on


def answers(config, detector, size):
    """Shapes of what it says to an image. On TPUs rows of layers are loops, and quick to trace.

    A ResNet that several have is traced once; what it gives is zeros afterwards.
    """
    images = np.zeros((1, *size, 3), np.float32), np.ones((1, *size), bool)

    def answer(detector):
        detector.backbone = lambda *_: {s: jnp.zeros(x.shape, x.dtype) for s, x in FEATURES[key].items()}
        return detector(*images)

    key = config.model.backbone.to_json(), detector.backbone.strides, config.precision, size
    with traced_for(mesh_on("tpu")):
        if key not in FEATURES:
            FEATURES[key] = nnx.eval_shape(lambda backbone: backbone(*images), detector.backbone)
        return nnx.eval_shape(answer, detector)


@pytest.mark.parametrize("name, variant", models(), ids=lambda value: value)
def test_variant_builds(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    detector = abstract_detector(config)
    group_multipliers(take_apart(detector)[1], config.optimizer.groups)
    predictions = answers(config, detector, (256, 320))
    layers, batch, queries, width = predictions.logits.shape
    assert (batch, queries) == (1, config.model.num_queries)
    build_classification(config.loss).check_width(width, config.model.num_classes)
    assert predictions.boxes.shape == (layers, 1, queries, 4)


@pytest.mark.parametrize("name", FILES)
def test_unknown_variant_lists_the_valid_ones(name):
    module = importlib.import_module(f"configs.{name}")
    with pytest.raises(ValueError, match=f"no variant 'r18'; it has {module.VARIANTS[0]}"):
        module.get_config("r18")


def rows_of_the_smca_table():
    """{name: (command line, parameters as written, of the paper or the log, then here)} of docs/smca.md."""
    found = {}
    for section in Path("docs/smca.md").read_text().split("\n## ")[1:]:
        variant = re.search(r"`(--config=\S+)` and \|", section)
        for line in section.splitlines():
            if re.search(r"\| \d\d\.\d+ \|", line) or "fourth type" in line:
                cells = [cell.strip() for cell in line.split("|")[1:-1]]
                command = [*([variant[1]] if variant else []), *shlex.split(cells[-1].replace("`", ""))]
                assert cells[0] not in found
                found[cells[0]] = command, re.findall(r"\| (\d\d\.\d+(?= M)|\d\d,\d{3},\d{3}\b)", line)
    return found


@pytest.mark.parametrize("row", rows_of_the_smca_table())
def test_every_row_of_the_smca_table_is_a_command(row):
    """It builds, and has the parameters that the table says, which are the paper's, rounded, or the official log's."""
    command, counts = rows_of_the_smca_table()[row]
    config = parse_config(["train.py", *command])
    detector = abstract_detector(config)
    trained = sum(math.prod(x.shape) for x in take_apart(detector)[1].values())
    assert bool(counts) == (len(config.model.strides) > 1)
    if counts:
        theirs, ours = counts
        assert ours == (f"{trained:,}" if "," in ours else f"{trained / 1e6:.2f}")
        assert theirs == ours if "," in ours else abs(trained / 1e6 - float(theirs)) < 0.15


def test_rows_of_the_smca_table_differ():
    configs = [parse_config(["train.py", *command]) for command, _ in rows_of_the_smca_table().values()]
    assert len({config.to_json() for config in configs}) == len(configs) == 8 + 8 + 4


def rows_of_the_detr_table():
    """{name: (cells as written, overrides)} of docs/detr.md: AP, change, APs, APl, parameters, overrides."""
    section = Path("docs/detr.md").read_text().split("\n## What the paper says")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    return {name: (cells, shlex.split(cells[-1].replace("`", ""))) for name, *cells in rows[1:]}


@pytest.mark.parametrize("row", rows_of_the_detr_table())
def test_every_row_of_the_detr_table_is_a_command(row):
    """It builds, every override has an effect, and it has the parameters that the table says, the paper's."""
    (ap, change, *_, parameters, _), overrides = rows_of_the_detr_table()[row]
    config = parse_config(["train.py", "--config=configs/detr.py:r50", *overrides], needs=field_needs)
    detector = abstract_detector(config)
    trained = sum(math.prod(x.shape) for x in take_apart(detector)[1].values())
    assert parameters == f"{trained / 1e6:.1f}"
    assert float(ap) == pytest.approx(40.6 + float(change or 0))
    assert answers(config, detector, (64, 96)).logits.shape == (6, 1, 100, 92)


def test_rows_of_the_detr_table_differ():
    rows = rows_of_the_detr_table()
    assert len({tuple(sorted(overrides)) for _, overrides in rows.values()}) == len(rows) == 11
    parameters = {cells[-2] for cells, _ in rows.values()}
    assert {"33.4", "37.4", "41.3", "49.2", "28.7"} == parameters  # as the paper's section 4.2 and table 2 have them

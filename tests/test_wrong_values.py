"""Values of the wrong range or kind, for every field of every family: one sentence before anything compiles."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import demo, smca
from deperceiver_jax.data import TrainBatches, open_source
from deperceiver_jax.data.batches.loader import EvaluationBatches
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.evaluate import make_detect_step
from deperceiver_jax.models import field_needs
from deperceiver_jax.models.features import resnet
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.runs.workdir import flat_fields
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.check_sizes import check_sizes
from deperceiver_jax.training.checkpoint import Checkpoints
from deperceiver_jax.training.timetable import due, last_step
from deperceiver_jax.training.trackers import check_trackers
from tests.drawn_arrays import Patches, abstract_detector
from tests.training.conftest import TinyDetector
from tests.unwritten_configs import configs_are_not_written  # noqa: F401

pytestmark = pytest.mark.slow

FAMILIES = ("deperceiver", "deperceiver_plus", "detr", "deformable_detr", "smca", "smca convolution")
BACKBONE = "detr"  # the family whose backbone's fields are tried; the others have the same one
VALUES = {
    int: ("0", "-1", "7", str(10**20), "many"),
    float: ("0", "-1", "1.5", "nan", "inf", "many"),
    str: ("nonsense", "(["),
    tuple: ("()", "(0,)", "(-1,)", "(7,)", f"({2**31 - 1},)", f"({10**20},)", "nonsense", "('nonsense',)"),
    bool: ("maybe",),
}


def tiny(family: str) -> ConfigDict:
    config = demo.get_config(family.split()[0])
    model = config.model
    model.update(num_classes=2, num_queries=6, embed_dim=32)
    if "convolution" in family:
        model.encoder = smca.convolution_encoder()
    for half in ("encoder", "decoder"):
        section = model.get(half, ConfigDict())
        sizes = dict(num_layers=1, num_heads=2, mlp_dim=8, layout=("intra",), num_latents=6, latent_dim=32)
        sizes |= dict(num_blocks=1, num_cross_attentions=1, cross_heads=2, self_heads=2, kernel_size=3)
        section.update({name: value for name, value in sizes.items() if name in section})
    return config


class CheckedPatches(Patches):
    """Patches, with what a ResNet refuses."""

    def __init__(
        self,
        *,
        depth,
        width,
        strides,
        norm,
        frozen_stages,
        dilation,
        groups,
        inner_ratio,
        deformable_stages,
        **how,
    ):
        fields = dict(depth=depth, width=width, norm=norm, frozen_stages=frozen_stages, dilation=dilation)
        inner = dict(groups=groups, inner_ratio=inner_ratio, deformable_stages=deformable_stages)
        resnet._check_bottlenecks(depth, width, **inner)
        stages = resnet._check(strides=tuple(strides), **fields)
        resnet._check_deformable(deformable_stages, len(stages), frozen_stages)
        super().__init__(strides=strides, **fields, **inner, **how)


def model_before_compiling(config: ConfigDict) -> None:
    """The detector as train.py makes it, and what it says to an image."""
    skeleton, params, others = take_apart(abstract_detector(config, CheckedPatches))
    check_sizes(skeleton.merge, {**params, **others}, [(64, 96)], make_mesh())


STEPS: dict[str, int] = {}  # by the fields that they come from


def check_data(config: ConfigDict) -> int:
    """Steps of an epoch. Whoever reads `config.data` looks at it, once at the same values."""
    values = repr((flat_fields(config.data), config.seed, config.eval.batch_size))
    if values not in STEPS:
        source, eval_source = (open_source(config.data, getattr(config.data, f"{s}_split")) for s in ("train", "eval"))
        EvaluationBatches(eval_source, config.data, batch_size=config.eval.batch_size)
        STEPS[values] = TrainBatches(source, config.data, seed=config.seed).steps_per_epoch
    return STEPS[values]


def run_before_compiling(config: ConfigDict, workdir) -> None:
    """What train.py does before its first compilation, with a detector of two layers in the place of the config's."""
    mesh = make_mesh(config.mesh.model, jax.devices()[:1])
    steps_per_epoch = check_data(config)
    num_steps = last_step(config.train, steps_per_epoch)
    check_trackers(config.train.trackers, Path("run"))
    for field in ("eval_every", "checkpoint_every"):
        due(config.train, field, steps_per_epoch, num_steps)

    def detector(rngs):
        return TinyDetector(rngs=rngs, width=2, dropout=0.0, queries=3)

    training = build_training(config, mesh, steps_per_epoch=steps_per_epoch, num_steps=num_steps, detector=detector)
    jax.eval_shape(training.schedule, jax.ShapeDtypeStruct((), jnp.int32))
    make_detect_step(training.plan.skeleton.merge, config, mesh)
    Checkpoints(workdir, keep=config.train.keep_checkpoints)


def refused(config: ConfigDict, field: str, text: str, before_compiling, *args) -> bool:
    """Whether a sentence refuses this value; any other error is the test's."""
    try:
        changed = parse_config(["train.py", f"--config.{field}={text}"], config, needs=field_needs)
        before_compiling(changed, *args)
    except UserError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return True
    except Exception as error:
        error.add_note(f"With --config.{field}={text}.")
        raise
    return False


LEGAL = {  # of values that are out of most fields' range
    "model.dropout": ("0",),
    "train.eval_every": ("-1",),
    "train.checkpoint_every": ("-1",),
    "train.trackers": ("()",),
    "eval.scales": ("()",),
}


def walk(config: ConfigDict, fields, before_compiling, *args) -> list[str]:
    """Those values that are out of the range of every field but those of LEGAL, and are not refused."""
    wrong = ("-1", "nan", "inf", "many", "maybe", "()", "(-1,)", f"({10**20},)", str(10**20), "('nonsense',)")
    found = []
    for field in fields:
        for text in VALUES[type(flat_fields(config)[field])]:
            taken = not refused(config, field, text, before_compiling, *args)
            if taken and text in wrong and text not in LEGAL.get(field, ()):
                found.append(f"{field}={text}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_a_model(family):
    config = tiny(family)
    fields = [field for field in flat_fields(config) if field.startswith("model.")]
    fields = [field for field in fields if family == BACKBONE or "backbone." not in field]
    assert walk(config, [*fields, "precision", "attention"], model_before_compiling) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embed_dim", [33, 34, 100])
def test_odd_widths(family, embed_dim):
    config = tiny(family)
    config.model.embed_dim = embed_dim
    for half in ("encoder", "decoder"):
        for name in ("num_heads", "cross_heads", "self_heads"):
            if name in config.model.get(half, ()):
                config.model[half][name] = 1
    with contextlib.suppress(UserError):
        model_before_compiling(config)


def test_the_other_fields(rectangles, tmp_path):
    config = tiny("detr")
    config.data.update(rectangles)
    config.data.update(train_split="validation", batch_size=2, max_size=96, scales=(64,))
    config.train.num_steps = 4
    fields = [field for field in flat_fields(config) if not field.startswith(("model.", "precision", "attention"))]
    fields.remove("data.prepared_directory")  # any folder will do
    assert walk(config, fields, run_before_compiling, tmp_path) == []

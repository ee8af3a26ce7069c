"""Every field of every family does something, or setting it is refused with the field that would let it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from configs import deformable_detr, deperceiver, deperceiver_plus, detr, smca
from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.field_needs import GENERAL, check_needs
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.losses.set_loss import set_loss
from deperceiver_jax.models import field_needs
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.program.command_line import parse_config
from deperceiver_jax.runs.workdir import flat_fields
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.training.build import build_training
from deperceiver_jax.training.compile_ahead import abstract_batch
from tests.drawn_arrays import Patches, new_detector
from tests.meshes import mesh_on
from tests.training.conftest import TinyDetector

pytestmark = pytest.mark.slow

FAMILIES = {
    "deperceiver": (deperceiver, "r50_16"),
    "deperceiver multi-scale": (deperceiver, "r50_multiscale"),
    "deperceiver_plus": (deperceiver_plus, "r50_16"),
    "detr": (detr, "r50"),
    "deformable_detr": (deformable_detr, "r50"),
    "deformable_detr single": (deformable_detr, "r50_single_scale"),
    "smca": (smca, "r50_single_scale"),
    "smca multi-scale": (smca, "r50_multiscale"),
    "smca convolution": (smca, "r50_multiscale_conv"),
}
# Other values of fields for which twice the value, of a float half of it, or the opposite would not do.
OTHERS = {
    "backbone.depth": 34,
    "backbone.norm": "group_norm",
    "backbone.frozen_stages": 1,
    "decoder.gaussian_scale": "single",
    "decoder.modulation": "head_shared",
    "decoder.query_position": "input",
    "decoder.residual": "query",
    "decoder.sampling": "gather",
    "decoder.scale_form": "width",
    "decoder.self_attention_value": "content",
    "encoder.kernel_size": 5,
    "encoder.latent_init": "truncated_normal",
    "encoder.layout": ("multi", "intra"),
    "encoder.num_cross_attentions": 2,
    "encoder.sampling": "gather",
    "level_dim": 2,
    "neck": "fpn",
    "box_deltas": "logits",
    "no_object_logit": None,  # goes with loss.classification
    "places": "pixels",
    "position.decoder": "input",
    "position.encoder": "input",
    "position.encoding": "learned",
    "position.use": "keys",
    "start": "learned",
    "strides": (8, 16),
}
# Fields that are no part of the model's arithmetic, or whose other values need more fields changed with them.
ELSEWHERE = ("name", "backbone.weights", "encoder.kind", "num_classes", "no_object_logit", "embed_dim")
BACKBONE = "detr"  # the family whose fields of the backbone are tried; the others have the same one
TOGETHER = {
    "backbone.norm": {"backbone.frozen_stages": 0},
    "backbone.dilation": {"backbone.depth": 50, "strides": (16,), "backbone.width": 2},
    **dict.fromkeys(("backbone.groups", "backbone.inner_ratio", "backbone.deformable_stages"), {"backbone.depth": 50}),
    "encoder.num_cross_attentions": {"encoder.num_blocks": 2},
    "neck": {"strides": (8, 16)},
    "relative_boxes": {"decoder.anchors": True},
    "two_stage": {"refine": True},
    "start": {"denoising.copies": 0},
}


def small(family: str) -> ConfigDict:
    module, variant = FAMILIES[family]
    config = module.get_config(variant)
    model = config.model
    model.update(num_classes=3, num_queries=4, embed_dim=32, dropout=0.1)
    model.backbone.update(depth=18, width=2)
    for half in ("encoder", "decoder"):
        section = model.get(half, ConfigDict())
        sizes = dict(num_layers=2, num_heads=2, mlp_dim=8, layout=("intra", "multi"), num_latents=4, latent_dim=32)
        sizes |= dict(num_blocks=2, layers_per_block=1, self_heads=2)
        section.update({name: value for name, value in sizes.items() if name in section})
    if family.startswith("deperceiver") and "plus" not in family:
        model.decoder.num_layers = 1
    config.matcher.backend = "scipy"  # a call, where the device's is a third of what is traced
    return config


def other_value(field: str, value):
    if field in OTHERS:
        return OTHERS[field]
    if isinstance(value, bool):
        return not value
    return value / 2 or 0.25 if isinstance(value, float) else 2 * value or 1


class Keys:
    """In the place of nnx.Rngs, whose counting takes a fifth of the time of what is traced here."""

    def __init__(self, key):
        self.key, self.count = key, 0

    def params(self):
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def told(value, names: dict) -> object:
    """A jaxpr, a part of one or a parameter of an operation, to compare: in a third of the time of its text."""
    if isinstance(value, core.Jaxpr | core.ClosedJaxpr):  # one class in jax 0.12
        jaxpr = getattr(value, "jaxpr", value)
        inputs = [told(variable, names) for variable in (*jaxpr.constvars, *jaxpr.invars)]
        steps = [
            (
                equation.primitive.name,
                [told(variable, names) for variable in (*equation.invars, *equation.outvars)],
                [(name, told(parameter, names)) for name, parameter in sorted(equation.params.items())],
            )
            for equation in jaxpr.eqns
        ]
        constants = [np.asarray(constant).tolist() for constant in getattr(value, "consts", ())]
        return constants, inputs, steps, [told(variable, names) for variable in jaxpr.outvars]
    if isinstance(value, core.Literal):
        return str(value.val), value.aval
    if isinstance(value, core.Var):
        return names.setdefault(value, len(names)), value.aval
    if isinstance(value, tuple | list):
        return [told(part, names) for part in value]
    return re.sub(r"0x[0-9a-f]+", "", str(value))


def program(config: ConfigDict, *, resnet: bool) -> object:
    """What a detector's start, its forward pass in training and its loss compute.

    Without `resnet` the backbone is the mean pixel of each cell.
    """
    backbone = None if resnet else Patches
    loss = dict(
        classification=build_classification(config.loss), config=config, mesh=make_mesh(devices=jax.devices()[:1])
    )

    @traced_for(mesh_on("tpu"))  # where rows of layers are loops, and quick to trace
    def compute(key, image, batch):
        detector = new_detector(config, backbone, rngs=Keys(key))
        valid = jnp.ones(image.shape[:3], bool)
        predictions = detector(image, valid, targets=batch.targets, dropout_key=key)
        return set_loss(predictions, batch, **loss)

    size = 128
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    batch = abstract_batch(1, (size, size), 2, None)
    traced = jax.make_jaxpr(compute)(jax.random.key(0), image, batch)
    # Without what nothing depends on: an array that is made and never used is no effect.
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    constants = zip(jaxpr.constvars, traced.consts, strict=True)
    kept = [(variable, value) for variable, value in constants if id(variable) in used]
    jaxpr = jaxpr.replace(constvars=[variable for variable, _ in kept])
    return told(jaxpr, {}), [np.asarray(value).tolist() for _, value in kept]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_of_the_model_has_an_effect_or_is_refused(family):
    config = small(family)
    before, needs = functools.cache(lambda resnet: program(config, resnet=resnet)), field_needs(config)
    fields = [name for name in flat_fields(config) if name.startswith("model.")] + ["loss.auxiliary"]
    refused = {}
    for field in fields:
        name = field.removeprefix("model.")
        if name in ELSEWHERE or (name.startswith("backbone.") and family != BACKBONE):
            continue
        value = other_value(name, flat_fields(config)[field])
        if (family, name) == ("detr", "strides"):
            value = (16,)
        changed = small(family)
        changed.update_from_flattened_dict({field: value})
        try:
            check_needs(changed, [field], needs)
        except UserError as error:
            assert str(error).startswith(f"config.{field} has no effect here; it would have one with ")
            refused[field] = value
            continue
        together = {f"model.{other}": x for other, x in TOGETHER.get(name, {}).items()}
        resnet = name.startswith("backbone.")
        base = before(resnet)
        if together:
            both = small(family)
            both.update_from_flattened_dict(together)
            base = program(both, resnet=resnet)
            changed.update_from_flattened_dict(together)
        assert program(changed, resnet=resnet) != base, f"{field} has no effect, and is not refused"
    changed = small(family)
    changed.update_from_flattened_dict(refused)
    resnet = family == BACKBONE
    assert program(changed, resnet=resnet) == before(resnet), (
        f"one of these is refused, but has an effect: {', '.join(refused)}"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss.classification": "sigmoid_focal", "optimizer.schedule": "cosine"},
        {"loss.classification": "sigmoid_iou_aware", "optimizer.schedule": "cosine", "optimizer.name": "muon"},
    ],
)
def test_a_field_of_loss_or_optimizer_has_an_effect_or_is_refused(changes):
    def config(**more):
        made = base()
        made.model = ConfigDict({"name": "detr", "num_classes": 1})
        made.matcher.backend = "scipy"
        made.update_from_flattened_dict({**changes, **{k.replace("__", "."): x for k, x in more.items()}})
        return made

    def step(config: ConfigDict) -> object:
        def detector(rngs):
            return TinyDetector(rngs=rngs, width=4, dropout=0.0, queries=3)

        mesh = make_mesh(devices=jax.devices()[:1])
        training = build_training(config, mesh, steps_per_epoch=2, num_steps=8, detector=detector)
        batch = abstract_batch(4, (8, 8), 2, None)
        learning_rates = [float(training.schedule(number)) for number in range(8)]
        return told(training.step.trace(training.plan.abstract, batch).jaxpr, {}), learning_rates

    values = {
        "loss.classification": "sigmoid_focal" if not changes else "softmax_no_object",
        "optimizer.name": "adamw" if "optimizer.name" in changes else "muon",
        "optimizer.drop_epochs": (1,),
        "optimizer.schedule": "step" if changes else "cosine",
        "optimizer.accumulate_steps": 2,
        "optimizer.ema_decay": 0.5,
    }
    small_drops = {"optimizer__drop_epochs": (2,)}
    before, refused = step(config(**small_drops)), {}
    for field, value in flat_fields(config()).items():
        section = field.split(".")[0]
        if section not in ("loss", "matcher", "optimizer") or field.startswith("optimizer.groups."):
            continue
        if field in ("matcher.backend", "loss.auxiliary"):  # the latter goes with the decoder's layers, above
            continue
        other = {field: values.get(field, other_value(field, value))}
        changed = config(**small_drops)
        changed.update_from_flattened_dict(other)
        try:
            check_needs(changed, [field], GENERAL)
        except UserError:
            refused |= other
            continue
        assert step(changed) != before, f"{field} has no effect, and is not refused"
    changed = config(**small_drops)
    changed.update_from_flattened_dict(refused)
    assert step(changed) == before, f"one of these is refused, but has an effect: {', '.join(refused)}"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["detr.py:r50", "model.position.fourier_bands=8"], "have one with config.model.position.encoding=fourier."),
        (
            ["detr.py:r50", "loss.focal_alpha=0.5"],
            "have one with config.loss.classification=sigmoid_focal or sigmoid_iou_aware and ",
        ),
        (["deperceiver.py:r50_16", "loss.auxiliary=True"], "one with config.model.decoder.num_layers of at least 2."),
        (["demo.py:detr", "train.num_epochs=3"], "would have one with config.train.num_steps=0."),
        (["demo.py:detr", "optimizer.drop_factor=0.5"], "would have one with config.optimizer.schedule=step."),
        (["demo.py:detr", "data.directory=/x"], "would have one with config.data.name=coco_directory."),
        (["demo.py:detr", "data.crop_min=8"], "would have one with config.data.crop_probability above 0."),
    ],
)
def test_the_command_line_refuses_what_would_do_nothing(arguments, sentence):
    file, override = arguments
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_config(["train.py", f"--config=configs/{file}", f"--config.{override}"], needs=field_needs)


def test_a_field_and_the_one_it_needs_go_together():
    arguments = ["--config=configs/detr.py:r50", "--config.model.position.fourier_bands=8"]
    arguments.append("--config.model.position.encoding=fourier")
    config = parse_config(["train.py", *arguments], needs=field_needs)
    assert config.model.position.fourier_bands == 8

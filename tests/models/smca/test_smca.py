"""SMCA: sizes, names and starts of the published models, what each ablation changes, bad fields. Values: parity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import demo, smca
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.features.resnet import ResNet
from deperceiver_jax.weights.name_rules import torch_shapes
from deperceiver_jax.weights.tables import FAMILIES
from tests.drawn_arrays import Patches, abstract_detector, start_beside_backbone

FIELDS = {
    "num_classes": 5,
    "num_queries": 7,
    "embed_dim": 16,
    "strides": (16,),
    "encoder.num_heads": 2,
    "encoder.mlp_dim": 24,
    "encoder.layout": ("intra", "intra"),
    "decoder.num_layers": 2,
    "decoder.num_heads": 2,
    "decoder.mlp_dim": 24,
}
SINGLE = {"extra_levels": 0, "level_embedding": False}
CONVOLUTION = {
    "strides": (8, 16),
    "encoder": smca.convolution_encoder().to_dict() | {"num_layers": 2, "kernel_size": 3, "mlp_dim": 24},
}


def published(variant, **changes):
    """A config whose fields of config.model are changed, with __ for dots."""
    config = smca.get_config(variant)
    config.model.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def small(**changes):
    """A multi-scale SMCA of two levels; a whole `encoder` replaces the small one."""
    config = smca.get_config("r50_multiscale")
    config.model.update_from_flattened_dict(FIELDS)
    if "encoder" in changes:
        config.model.encoder = changes.pop("encoder")
    config.model.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def build(config, backbone=Patches):
    """(the detector as a function of arrays, image and mask; random arrays, nothing left at zero or one)."""
    graphdef, abstract = nnx.split(abstract_detector(config, backbone))
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        return (0.3 * rng.standard_normal(x.shape) + ("norm" in name and "scale" in name)).astype(x.dtype)

    def call(state, image, valid, key=None):
        return nnx.merge(graphdef, state)(image, valid, dropout_key=key)

    return call, jax.tree_util.tree_map_with_path(draw, abstract)


def example():
    """Three images of different sizes in a frame of 64 x 64."""
    sizes = ((64, 48), (32, 64), (64, 64))
    valid = np.zeros((3, 64, 64), bool)
    for b, (height, width) in enumerate(sizes):
        valid[b, :height, :width] = True
    image = np.random.default_rng(0).standard_normal((3, 64, 64, 3)).astype(np.float32)
    return np.where(valid[..., None], image, 0), valid


def compiled(config):
    """(the detector compiled, its arrays, its answer)."""
    call, state = build(config)
    program = jax.jit(call)

    def answer(*arguments):
        return jax.device_get(program(*arguments))

    return answer, state, answer(state, *example())


@pytest.fixture(scope="module")
def usual():
    return compiled(small())


def arrays_of(detector):
    """The trained parameters, by path."""
    return {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(detector, nnx.Param))}


@pytest.mark.parametrize(
    "scale, trained",
    [("independent", 41_538_082), ("fixed", 41_513_410), ("single", 41_525_746), ("coupled", 41_550_418)],
)
def test_number_of_parameters(scale, trained):
    """The released single-scale models'; tests/test_configs.py has those of several scales."""
    config = published("r50_single_scale", decoder__gaussian_scale=scale)
    assert sum(math.prod(x.shape) for x in arrays_of(abstract_detector(config)).values()) == trained


@pytest.mark.parametrize(
    "variant, changes, names",
    [
        ("r50_single_scale", {}, 500),
        ("r50_single_scale", {"decoder__gaussian_scale": "fixed"}, 488),
        ("r50_multiscale_conv", {}, 593),
        ("r50_multiscale_conv", {"encoder__share_crossings": False}, 641),
    ],
)
def test_released_names(variant, changes, names):
    """As many as the official state dicts have."""
    config = published(variant, **changes)
    shapes = torch_shapes(abstract_detector(config), FAMILIES["smca"](config.model))
    assert len(shapes) == names
    assert shapes["class_embed.weight"] == (92, 256)
    assert shapes["transformer.decoder.layers.0.point1.layers.2.weight"] == (2, 256)


def test_the_paper_s_encoder_was_never_released():
    config = published("r50_multiscale")
    with pytest.raises(UserError, match="for which the published checkpoints have no name"):
        torch_shapes(abstract_detector(config), FAMILIES["smca"](config.model))


def test_variants():
    models = {f"{net}_{m}" for net in ("r50", "r101") for m in ("single_scale", "multiscale", "multiscale_conv")}
    assert set(smca.VARIANTS) == models | {f"{model}_108ep" for model in models}
    short, long = smca.get_config("r50_single_scale"), smca.get_config("r50_single_scale_108ep")
    assert (short.train.num_epochs, short.optimizer.drop_epochs) == (50, (40,))
    assert (long.train.num_epochs, long.optimizer.drop_epochs) == (108, (86,))
    assert short.model.to_dict() == long.model.to_dict()
    assert (short.model.num_queries, short.loss.classification, short.loss.weight_class) == (300, "sigmoid_focal", 2.0)
    assert smca.get_config("r101_multiscale").model.backbone.depth == 101


def test_published_start():
    """Classes at 1 %, scales of one, encoder layers alike up to their matrices, decoder layers not."""
    start = start_beside_backbone(small(**CONVOLUTION))
    np.testing.assert_allclose(start["heads/class_head/linear/bias"], -4.59512, rtol=1e-5)
    assert start["heads/box_head/mlp/layers/2/kernel"].std() > 0.05
    layers = "decoder/layers/layers"
    assert not start[f"{layers}/modulation/scale/kernel"].any() and np.all(
        start[f"{layers}/modulation/scale/bias"] == 1
    )
    assert not np.array_equal(*start[f"{layers}/mlp/layers/0/bias"])
    layers = "encoder/layers/layers"
    for path in ("mlp/layers/0", "within/0", "down/0", "before"):
        assert np.array_equal(*start[f"{layers}/{path}/bias"]) and start[f"{layers}/{path}/bias"].any()
        assert not np.array_equal(*start[f"{layers}/{path}/kernel"])
    bounds = {
        f"{layers}/within/1/kernel": math.sqrt(6 / (9 + 16 * 9)),
        f"{layers}/before/kernel": math.sqrt(6 / 32),
        "decoder/layers/layers/modulation/offset/kernel": math.sqrt(6 / (16 + 12)),
        "encoder/reduce/kernel": 1 / math.sqrt(9 * 16),
    }
    for path, bound in bounds.items():
        assert 0.9 * bound < np.abs(start[path]).max() <= bound, path
    assert 0.5 < start["level_embedding"].std() < 1.5


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder__modulation": "none"},
        {"decoder__modulation": "head_shared"},
        {"decoder__gaussian_scale": "fixed"},
        {"decoder__gaussian_scale": "single"},
        {"decoder__gaussian_scale": "coupled"},
        {"decoder__scale_form": "width"},
        {"decoder__beta": 4.0},
        {"decoder__stride_factor": False},
        {"decoder__center_layers": 2},
        {"decoder__scale_selection": False},
        {"level_embedding": False},
        {"encoder__layout": ("multi", "intra")},
        {"encoder__share_attention": False},
        {"encoder__share_mlp": False},
        {"encoder__share_attention": False, "encoder__layout": ("multi", "multi")},
        SINGLE,
    ],
)
def test_every_ablation_is_another_program(usual_program, changes):
    """What the parts compute is tested with them; here, that the field reaches them."""
    assert program(small(**changes)) != usual_program


def program(config):
    call, state = build(config)
    return str(jax.make_jaxpr(call)(state, *example()))


@pytest.fixture(scope="module")
def usual_program():
    return program(small())


@pytest.mark.parametrize("changes", [{}, CONVOLUTION], ids=["attention", "convolution"])
def test_the_order_of_images_does_not_matter(usual, changes):
    """Each image has its own scale attention; the released code takes that of the first for all."""
    call, state, answer = compiled(small(**changes)) if changes else usual
    order = np.array([2, 0, 1])
    reordered = call(state, *(x[order] for x in example()))
    np.testing.assert_allclose(reordered.logits, answer.logits[:, order], atol=2e-5)
    np.testing.assert_allclose(reordered.boxes, answer.boxes[:, order], atol=2e-6)
    assert np.abs(answer.logits[:, 0] - answer.logits[:, 1]).max() > 1e-2


def test_padding_does_not_matter():
    """With group norm, whose features know the padding. (Convolutions as an encoder look at it.)"""
    fields = {"backbone__depth": 18, "backbone__width": 4, "backbone__norm": "group_norm", "backbone__frozen_stages": 0}
    call, state = build(small(strides=(8,), **fields), ResNet)
    image, valid = example()
    pad = ((0, 0), (0, 64), (0, 128))
    far = np.pad(image, (*pad, (0, 0))), np.pad(valid, pad)
    near, far = jax.device_get([jax.jit(call)(state, *images) for images in ((image, valid), far)])
    np.testing.assert_allclose(near.logits, far.logits, atol=5e-5)
    np.testing.assert_allclose(near.boxes, far.boxes, atol=5e-6)
    assert np.abs(near.logits[:, 0] - near.logits[:, 1]).max() > 1e-2


def test_boxes_start_from_the_centre(usual):
    """The same centres for every image and layer: without the box head's answer, boxes are at them."""
    call, state, _ = usual
    state = jax.tree.map(np.copy, state)
    head = state["heads"]["box_head"]["mlp"]["layers"][2]
    for leaf in (head["kernel"], head["bias"]):
        leaf.set_value(np.zeros_like(leaf.get_value()))
    boxes = call(state, *example()).boxes
    assert np.all(boxes[..., 2:] == 0.5) and boxes[0, 0, :, :2].std() > 1e-3
    np.testing.assert_allclose(boxes, np.broadcast_to(boxes[:1, :1], boxes.shape), atol=1e-6)


def test_dropout_needs_a_key(usual):
    call, state, answer = usual
    one, same, other = (call(state, *example(), jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.logits, same.logits)
    assert np.abs(one.logits - other.logits).max() > 1e-2 and np.abs(one.logits - answer.logits).max() > 1e-2


def test_bfloat16_is_near_float32(usual):
    config = small()
    config.precision = "bfloat16"
    _, _, answer = compiled(config)
    assert answer.logits.dtype == answer.boxes.dtype == jnp.float32
    assert 1e-4 < np.abs(answer.boxes - usual[2].boxes).max() < 0.1


def test_the_demo_takes_gradients():
    """Of every parameter behind the backbone, finite and not all zero."""
    call, state = build(demo.get_config("smca"))
    image, valid = example()

    def loss(state):
        answer = call(state, image, valid)
        return jnp.sum(answer.logits**2) + jnp.sum(answer.boxes**2)

    for path, x in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        gradient = np.asarray(x.get_value())
        assert np.isfinite(gradient).all() and gradient.any(), path


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"decoder__modulation": "all"}, "decoder.modulation is 'all'; it can be none, head_shared or multi_head."),
        ({"decoder__gaussian_scale": "type4"}, "it can be fixed, single, independent or coupled."),
        ({"decoder__scale_form": "square"}, "decoder.scale_form is 'square'; it can be inverse or width."),
        ({"decoder__beta": 0.0}, "config.model.decoder.beta is 0.0; it must be above 0."),
        ({"decoder__center_layers": 0}, "config.model.decoder.center_layers is 0; it must be at least 1."),
        ({"decoder__num_layers": 0}, "config.model.decoder.num_layers is 0; it must be at least 1."),
        ({"encoder__layout": ("intra", "inter")}, r"layout is \('intra', 'inter'\); each of its layers is intra or"),
        ({"encoder__layout": ()}, r"config.model.encoder.layout is \(\)"),
        ({"encoder__mlp_dim": 0}, "config.model.encoder.mlp_dim is 0"),
        ({"encoder__kind": "pooling"}, "config.model.encoder.kind is 'pooling'; it can be attention or convolution."),
        ({"encoder__kind": "convolution"}, "config.model.encoder lacks kernel_size, num_layers, pointwise"),
        ({"extra_levels": -1}, "config.model.extra_levels is -1; it must be at least 0."),
        ({"embed_dim": 15}, "config.model.embed_dim is 15"),
        ({"encoder__num_heads": 3}, "num_heads is 3; it must divide"),
    ],
)
def test_bad_fields_are_named(changes, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        abstract_detector(small(**changes), Patches)

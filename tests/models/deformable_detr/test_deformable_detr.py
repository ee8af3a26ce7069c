"""Deformable DETR: sizes, groups and starts of the published models, places, bad fields. Values: golden tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import deformable_detr
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deformable_detr.transformer import DeformableEncoder, EncoderFields
from deperceiver_jax.models.features.resnet import Frozen
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.training.check_sizes import check_sizes
from deperceiver_jax.training.optimizer import group_multipliers
from deperceiver_jax.weights.name_rules import torch_shapes, with_copies
from deperceiver_jax.weights.tables import FAMILIES
from tests.drawn_arrays import (
    FLOAT32,
    Patches,
    abstract_detector,
    extents_seen,
    level_tokens,
    start_beside_backbone,
)
from tests.seeded import seeded_state_dict
from tests.torch_state import load_torch_state, to_torch_state

pytestmark = pytest.mark.slow

SINGLE = {"strides": (16,), "extra_levels": 0}
REFINE = {"refine": True}
TWO_STAGE = {"refine": True, "two_stage": True}
WITHIN_LEVELS = {"encoder__across_levels": False, "encoder__num_points": 1, "decoder__num_points": 1}


def small(**changes):
    """A Deformable DETR in two encoder and two decoder layers; `changes` are fields of config.model, __ for dots."""
    config = deformable_detr.get_config("r50")
    fields = {"num_classes": 5, "num_queries": 7, "embed_dim": 32, "strides": (8, 16)}
    for half in ("encoder", "decoder"):
        fields |= {f"{half}.num_layers": 2, f"{half}.num_heads": 4, f"{half}.num_points": 2, f"{half}.mlp_dim": 48}
    config.model.update_from_flattened_dict({**fields, **{k.replace("__", "."): v for k, v in changes.items()}})
    return config


@functools.cache
def build(precision="float32", **changes):
    """(the small detector as a jitted function of arrays, image and mask; random arrays)."""
    config = small(**changes)
    config.precision = precision
    graphdef, abstract = nnx.split(abstract_detector(config, Patches))
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (0.3 * rng.standard_normal(x.shape) + ("scale" in jax.tree_util.keystr(path))).astype(x.dtype)

    call = jax.jit(lambda state, image, valid, key=None: nnx.merge(graphdef, state)(image, valid, dropout_key=key))
    return call, jax.tree_util.tree_map_with_path(draw, abstract)


def example(height=64, width=64, valid_width=48):
    image = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    valid = np.ones((2, height, width), bool)
    valid[1, :, valid_width:] = False
    return np.where(valid[..., None], image, 0), valid


def arrays_of(module, kind):
    return {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(module, kind))}


def count(arrays):
    return sum(math.prod(x.shape) for x in arrays.values())


@pytest.mark.parametrize(
    "variant, trained, points, rest",
    [
        ("r50_single_scale", 33_844_193, 197_890, 10_413_791),
        ("r50_single_scale_dc5", 33_844_193, 197_890, 10_413_791),
        ("r50", 39_847_265, 790_018, 15_824_735),
        ("r50_refine", 40_627_260, 790_018, 16_604_730),
        ("r50_two_stage", 40_959_129, 789_504, 16_937_113),
    ],
)
def test_sizes_and_groups_of_the_released_models(variant, trained, points, rest):
    config = deformable_detr.get_config(variant)
    detector = abstract_detector(config)
    parameters, frozen = arrays_of(detector, nnx.Param), arrays_of(detector, Frozen)
    assert count(parameters) == trained
    assert count({path: x for path, x in frozen.items() if path.endswith("kernel")}) == 222_400
    multipliers = group_multipliers(parameters, config.optimizer.groups)
    slow = {path: x for path, x in parameters.items() if multipliers[path] == 0.1 and not path.startswith("backbone/")}
    assert count(slow) == points
    assert count({path: x for path, x in parameters.items() if multipliers[path] == 1.0}) == rest


def test_variants():
    released = ("r50_single_scale", "r50_single_scale_dc5", "r50", "r50_refine", "r50_two_stage")
    assert deformable_detr.VARIANTS == (
        *released,
        "r101_two_stage",
        "x101_two_stage",
        "x101_dcn_two_stage",
        "r50_150ep",
    )
    with pytest.raises(ValueError, match="no variant 'r18'; it has r50_single_scale, r50_single_scale_dc5, r50, r50_"):
        deformable_detr.get_config("r18")
    config = deformable_detr.get_config()
    assert (config.data.batch_size, config.train.num_epochs, config.optimizer.drop_epochs) == (32, 50, (40,))
    assert (config.loss.weight_class, config.matcher.cost_class, config.optimizer.learning_rate) == (2, 2, 2e-4)
    long = deformable_detr.get_config("r50_150ep")
    assert (long.train.num_epochs, long.optimizer.drop_epochs) == (150, (120,))
    assert long.model.to_dict() == config.model.to_dict()
    deep, shallow = (deformable_detr.get_config(f"{net}_two_stage") for net in ("r101", "r50"))
    shallow.model.backbone.update(depth=101, weights="hf://timm/resnet101.tv_in1k")
    assert deep.to_json() == shallow.to_json()


LATERALS = sum(channels * 256 + 256 for channels in (512, 1024, 2048))
NORM = 2 * 256
FUSION = 9 * 256 + 256 * 256 + 256 + NORM  # a depthwise and a pointwise convolution; weights of the maps come on top


@pytest.mark.parametrize(
    "neck, size",
    [
        ("fpn", LATERALS + 3 * (9 * 256 * 256 + 256 + NORM)),
        ("bifpn", LATERALS + 3 * NORM + 3 * (4 * FUSION + 2 + 2 + 3 + 2)),
    ],
)
def test_necks_stand_before_the_levels(neck, size):
    """The paper's table 2: everything behind is as before, but for the width of the maps that levels are made of."""
    config = deformable_detr.get_config("r50")
    before = arrays_of(abstract_detector(config), nnx.Param)
    config.model.neck = neck
    after = arrays_of(abstract_detector(config), nnx.Param)
    assert count({path: x for path, x in after.items() if path.startswith("neck/")}) == size
    assert {path: x.shape for path, x in after.items() if not path.startswith(("neck/", "levels/"))} == {
        path: x.shape for path, x in before.items() if not path.startswith("levels/")
    }
    assert after["levels/projections/3/kernel"].shape == (3, 3, 256, 256)


@pytest.mark.parametrize("neck", ["fpn", "bifpn"])
def test_a_neck_brings_deeper_maps_into_a_level(neck):
    """Of one level of stride 16, whose tokens know what the map of stride 32 holds."""
    detector = abstract_detector(small(strides=(16,), extra_levels=0, neck=neck), Patches)
    assert detector.token_strides == (16,) and detector.neck.sources == (16, 32)
    image, valid = example()
    tokens = nnx.eval_shape(lambda d: d._tokens(d.backbone(image, valid), valid), detector)
    assert tokens.sizes == ((4, 4),) and tokens.tokens.shape == (2, 16, 32)


@pytest.mark.parametrize("changes", [{}, REFINE, TWO_STAGE])
def test_start(changes):
    """Classes at 1 %, boxes at their references; sizes of sigmoid(-2) of the image, or of the proposals."""
    start = start_beside_backbone(small(**changes))
    heads = "decoder/layers/layers/heads" if changes else "decoder/heads"
    np.testing.assert_allclose(start[f"{heads}/class_head/linear/bias"], -math.log(99), rtol=1e-6)
    assert not start[f"{heads}/box_head/mlp/layers/2/kernel"].any()
    bias = {
        0: [0, 0, -2, -2],
        1: [[0, 0, -2, -2], [0, 0, 0, 0]],  # only the first layer starts from a point
        2: np.zeros((2, 4)),
    }[len(changes)]
    np.testing.assert_array_equal(start[f"{heads}/box_head/mlp/layers/2/bias"], bias)
    if changes:
        for name in ("class_head/linear/kernel", "box_head/mlp/layers/0/kernel", "box_head/mlp/layers/1/bias"):
            first, second = start[f"{heads}/{name}"]
            assert first.std() > 0
            np.testing.assert_array_equal(first, second)
    for half in ("encoder", "decoder"):
        mlp = f"{half}/layers/layers/mlp/layers/0"
        assert np.array_equal(*start[f"{mlp}/bias"]) and not np.array_equal(*start[f"{mlp}/kernel"])
    assert ("queries" in start) == ("proposals/query/kernel" not in start) == ("two_stage" not in changes)


def test_places_by_hand():
    """One 3 x 4 level whose upper left 2 x 3 cells are real, and one whole one."""
    valid = np.zeros((1, 3, 4), bool)
    valid[:, :2, :3] = True
    tokens = jax.device_get(level_tokens([valid, np.ones((1, 1, 2), bool)]))
    assert tokens.sizes == ((3, 4), (1, 2))
    np.testing.assert_allclose(tokens.valid_share[0, 0], [[0.75, 2 / 3], [1, 1]], rtol=1e-6)
    padded = tokens.places[0, :12] * tokens.valid_share[0, :, 0]  # relative to the padded map: the plain centres
    np.testing.assert_allclose(padded[:2], [[0.125, 1 / 6], [0.375, 1 / 6]], rtol=1e-6)
    np.testing.assert_allclose(tokens.places[0, 12:], [[0.25, 0.5], [0.75, 0.5]], rtol=1e-6)
    assert list(tokens.valid[0].astype(int)) == [1, 1, 1, 0] * 2 + [0] * 4 + [1] * 2


@pytest.mark.parametrize("changes", [{}, SINGLE, REFINE, TWO_STAGE, WITHIN_LEVELS])
def test_forward(changes):
    """Every variant answers, differently for different images."""
    call, state = build(**changes)
    answer = jax.device_get(call(state, *example()))
    assert answer.logits.shape == (2, 2, 7, 5) and answer.boxes.shape == (2, 2, 7, 4)
    assert np.isfinite(answer.logits).all() and (answer.boxes >= 0).all() and (answer.boxes <= 1).all()
    assert np.abs(answer.logits[:, 0] - answer.logits[:, 1]).max() > 1e-3
    tokens = 64 + 16 + 4
    if "two_stage" in changes:
        assert answer.proposals.logits.shape == (1, 2, tokens, 5)
        assert answer.proposals.boxes.shape == (1, 2, tokens, 4)
    else:
        assert answer.proposals is None


@pytest.mark.parametrize(
    "places, sizes",
    [("cells", [[5, 4], [3, 2]]), ("pixels", [[70 / 16, 50 / 16], [70 / 32, 50 / 32]])],
)
def test_the_size_of_images(places, sizes):
    """Two levels, the second an extra one, of images of 50 x 70 pixels."""
    valid = np.zeros((1, 64, 80), bool)
    valid[:, :50, :70] = True
    image = np.float32(valid[..., None].repeat(3, axis=3))
    np.testing.assert_allclose(extents_seen(small(places=places, strides=(16,)), image, valid), [sizes])


def test_encoder_within_levels():
    """Without `across_levels` each level is encoded as if it were the only one; with it, levels change one another."""
    fields = dict(num_layers=2, num_heads=4, num_points=1, mlp_dim=48, sampling="auto")
    rng = np.random.default_rng(0)
    valid = [np.ones((2, 4, 6), bool), np.ones((2, 2, 3), bool)]
    valid[0][1, :, 4:] = valid[1][1, :, 2:] = False
    tokens, position = rng.standard_normal((2, 2, 30, 32)).astype(np.float32)

    def encoder(num_levels, across_levels):
        def make():
            new = dict(num_levels=num_levels, dropout=0.0, compute=FLOAT32, rngs=nnx.Rngs(0))
            return DeformableEncoder(32, EncoderFields(**fields, across_levels=across_levels), **new)

        graphdef, abstract = nnx.split(nnx.eval_shape(make))
        draw = np.random.default_rng(1)
        state = jax.tree.map(lambda x: (0.3 * draw.standard_normal(x.shape)).astype(x.dtype), abstract)

        @jax.jit
        def call(levels, tokens, position):
            image = level_tokens(levels).replace(tokens=tokens, position=position)
            return nnx.merge(graphdef, state)(image).tokens

        return lambda *arguments: np.asarray(call(*arguments))

    own, alone = encoder(2, False), encoder(1, True)
    memory = own(valid, tokens, position)
    for level, cells in enumerate((slice(0, 24), slice(24, 30))):
        np.testing.assert_allclose(
            memory[:, cells],
            alone(valid[level : level + 1], tokens[:, cells], position[:, cells]),
            rtol=1e-4,
            atol=1e-5,
        )
    other = tokens.copy()
    other[:, 24:] += 1
    np.testing.assert_array_equal(own(valid, other, position)[:, :24], memory[:, :24])
    across = encoder(2, True)
    assert np.abs(across(valid, other, position) - across(valid, tokens, position))[:, :24].max() > 1e-2


def test_dropout_needs_a_key():
    call, state = build()
    one, same, other = (np.asarray(call(state, *example(), jax.random.key(seed)).logits) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_references_have_no_gradient_between_layers():
    """With refinement the first layer's heads do not learn from the last layer's boxes; the queries' points do."""
    call, state = build(**REFINE)
    learning, rest = nnx.split_state(state, lambda path, _: "box_head" in path or "reference_points" in path, ...)

    @jax.jit
    @jax.grad
    def gradient_of(learning, layer_weight):
        boxes = call(nnx.merge_state(learning, rest), *example()).boxes
        return jnp.sum(boxes * layer_weight[:, None, None, None])

    first, last = (arrays_of(jax.device_get(gradient_of(learning, x)), nnx.Param) for x in np.eye(2, dtype=np.float32))
    head = last["decoder/layers/layers/heads/box_head/mlp/layers/2/kernel"]
    assert not head[0].any() and head[1].any()
    assert first["reference_points/kernel"].any()


def test_gradients_are_finite_with_proposals_outside():
    """Padded and border tokens propose with infinite logits; none of it reaches a gradient."""
    call, state = build(**TWO_STAGE)

    @jax.jit
    @jax.grad
    def gradient_of(state):
        answer = call(state, *example())
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(answer))

    for path, gradient in arrays_of(jax.device_get(gradient_of(state)), nnx.Param).items():
        assert np.isfinite(gradient).all(), path


def test_bfloat16_is_near_float32():
    (call, state), (half_call, _) = build(**REFINE), build("bfloat16", **REFINE)
    answer, half = jax.device_get((call(state, *example()), half_call(state, *example())))
    assert half.logits.dtype == half.boxes.dtype == jnp.float32
    assert 0 < np.abs(half.boxes - answer.boxes).max() < 0.1


@pytest.mark.parametrize("changes, copies", [({}, 8), (REFINE, 12), (TWO_STAGE, 24)])
def test_copies_in_the_state_dict(changes, copies):
    """Two layers: shared heads of 8 arrays once more; 6 of each box head, and 2 of each class head with proposals."""
    config = small(**changes)
    config.model.backbone.update(depth=18, width=8)
    config.model.strides = (16,)
    detector = abstract_detector(config)
    rules = FAMILIES["deformable_detr"](config.model)
    state = seeded_state_dict(torch_shapes(detector, rules))
    whole = with_copies(state, rules)
    assert len(whole) - len(state) == copies
    counts = {"transformer.decoder.layers.0.total_params": np.zeros(1)}
    report = load_torch_state(detector, {**whole, **counts}, rules)
    assert len(report.loaded) == len(state) and len(report.ignored) == copies + 1
    back = to_torch_state(detector, rules)
    assert set(back) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    load_torch_state(detector, state, rules)  # a file may leave copies out
    copy = sorted(set(whole) - set(state))[0]
    with pytest.raises(UserError, match=f"x.pth holds {copy}, which should be copies of other arrays but differ"):
        load_torch_state(detector, {**whole, copy: whole[copy] + 1}, rules, source="x.pth")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"two_stage": True}, "config.model.two_stage needs config.model.refine=True"),
        ({"places": "cell"}, "config.model.places is 'cell'; it can be cells or pixels."),
        ({"embed_dim": 48}, "config.model.embed_dim is 48; its 32 norm groups must be of equal width"),
        ({"extra_levels": -1}, "config.model.extra_levels is -1; it must be at least 0"),
        ({"encoder__num_layers": 0}, "config.model.encoder.num_layers is 0; it must be at least 1"),
        ({"decoder__mlp_dim": 0}, "config.model.decoder.mlp_dim is 0; it must be at least 1"),
        ({"decoder__num_heads": 5}, "num_heads is 5; it must divide"),
        ({"strides": (8, 64)}, r"config.model.strides is \(8, 64\); a ResNet has the strides 4, 8, 16, 32"),
        ({"neck": "pan"}, "config.model.neck is 'pan'; it can be none, fpn or bifpn."),
        ({"neck": "fpn", "strides": (32,)}, r"neck is fpn, which mixes maps; config.model.strides \(32,\) has one."),
        ({"neck": "bifpn", "neck_layers": 0}, "config.model.neck_layers is 0; it must be at least 1"),
    ],
)
def test_bad_fields_are_named(changes, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        abstract_detector(small(**changes))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"extra_levels": 2},
            "config.model.extra_levels: level 3 of an image of this size would halve a map of a single",
        ),
        ({"num_queries": 30, **TWO_STAGE}, "config.model.num_queries is 30, more than the 21 tokens that an image"),
    ],
)
def test_too_small_images_are_refused_before_the_first_step(changes, sentence):
    """The size that is too small is one of several, and named."""
    skeleton, params, others = take_apart(abstract_detector(small(**changes), Patches))
    check_sizes(skeleton.merge, {**params, **others}, [(64, 64), (96, 64), (64, 96), (128, 128)], make_mesh())
    with pytest.raises(UserError, match=f"Images of 32 x 32 pixels, padding included, will come, but: {sentence}"):
        check_sizes(skeleton.merge, {**params, **others}, [(64, 64), (32, 32), (96, 96)], make_mesh())

"""DETR: sizes and starts of the published models, what each field does, what bad fields say. Values: golden tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import detr
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.detr.transformer import TransformerDecoder, TransformerEncoder
from deperceiver_jax.models.features.resnet import ResNet
from deperceiver_jax.runs.workdir import flat_fields
from tests.drawn_arrays import FLOAT32, Patches, abstract_detector, start_beside_backbone


class WholePatches(Patches):
    """Patches of which a cell is its pixels, zero on padding."""

    def channels_of(self, stride):
        return 3 * stride**2

    def __call__(self, image, pixel_valid):
        batch, height, width, _ = image.shape
        (s,) = self.strides
        cells = image.reshape(batch, height // s, s, width // s, s, 3).swapaxes(2, 3)
        return {s: cells.reshape(batch, height // s, width // s, -1)}


def small(**changes):
    """A DETR in two encoder and two decoder layers; `changes` are fields of config.model, with __ for dots."""
    config = detr.get_config("r50")
    fields = {
        "num_classes": 5,
        "num_queries": 7,
        "embed_dim": 32,
        "strides": (16,),
        "encoder.num_layers": 2,
        "encoder.num_heads": 4,
        "encoder.mlp_dim": 48,
        "decoder.num_layers": 2,
        "decoder.num_heads": 4,
        "decoder.mlp_dim": 48,
    }
    config.model.update_from_flattened_dict({**fields, **{k.replace("__", "."): v for k, v in changes.items()}})
    return config


def random_numbers(abstract):
    """Every parameter drawn anew, nothing left at zero or one; initialisers would take longer to compile."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (0.3 * rng.standard_normal(x.shape) + ("scale" in jax.tree_util.keystr(path))).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def build(backbone=WholePatches, precision="float32", **changes):
    """The small detector, compiled, with `random_numbers`: (image, mask, key) -> its answer in NumPy."""
    config = small(**changes)
    config.precision = precision
    graphdef, abstract = nnx.split(abstract_detector(config, backbone))
    state = random_numbers(abstract)
    call = jax.jit(lambda state, image, valid, key: nnx.merge(graphdef, state)(image, valid, dropout_key=key))
    return lambda image, valid, dropout_key=None: jax.device_get(call(state, image, valid, dropout_key))


def parameters(config):
    """The trained parameters, by path, without making them."""
    state = nnx.state(abstract_detector(config), nnx.Param)
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def count(config):
    return sum(math.prod(x.shape) for x in parameters(config).values())


def example(height=64, width=64, valid_width=48):
    image = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    valid = np.ones((2, height, width), bool)
    valid[1, :, valid_width:] = False
    return np.where(valid[..., None], image, 0), valid


def test_variants():
    models = {f"{net}{dilation}" for net in ("r50", "r101") for dilation in ("", "_dc5")} | {"r50_dc5_plus"}
    assert set(detr.VARIANTS) == models | {f"{model}_50ep" for model in models}
    with pytest.raises(ValueError, match="no variant 'r18'; it has r50, r50_dc5, r101, r101_dc5, r50_dc5_plus, r50_"):
        detr.get_config("r18")
    long, short = detr.get_config("r101_dc5"), detr.get_config("r101_dc5_50ep")
    assert (long.train.num_epochs, long.optimizer.drop_epochs) == (300, (200,))
    assert (short.train.num_epochs, short.optimizer.drop_epochs) == (50, (33,))
    assert short.model.to_dict() == long.model.to_dict()
    assert long.loss.auxiliary and long.model.dropout == 0.1
    assert (long.model.backbone.depth, long.model.backbone.dilation, long.model.strides) == (101, True, (16,))


def test_dc5_plus_is_dc5_with_the_focal_loss_and_300_queries():
    """As Deformable DETR's paper compares with; the weights of the focal loss are its own."""
    before, plus = (flat_fields(detr.get_config(name)) for name in ("r50_dc5", "r50_dc5_plus"))
    assert {name: value for name, value in plus.items() if value != before[name]} == {
        "model.num_queries": 300,
        "model.no_object_logit": False,
        "loss.classification": "sigmoid_focal",
        "loss.weight_class": 2.0,
        "matcher.cost_class": 2.0,
    }


@pytest.mark.parametrize(
    "variant, trained", [("r50", 41_302_368), ("r50_dc5", 41_302_368), ("r101", 60_242_272), ("r101_dc5", 60_242_272)]
)
def test_number_of_parameters(variant, trained):
    """Those of the released models."""
    config = detr.get_config(variant)
    assert count(config) == trained
    rest = [x for path, x in parameters(config).items() if not path.startswith("backbone/")]
    assert sum(math.prod(x.shape) for x in rest) == 18_069_856


def test_no_mlp_leaves_out_the_mlps():
    """The paper's ablation: 28.7 million parameters remain of 41.3 (its count includes 0.2 million frozen ones)."""
    config = detr.get_config("r50")
    config.model.encoder.mlp_dim = config.model.decoder.mlp_dim = 0
    assert round((count(config) + 222_400) / 1e6, 1) == 28.9  # 28.7 in the paper, which counts 41.3 for 41.5
    assert not any("mlp" in path for path in parameters(config) if path.startswith(("encoder/", "decoder/")))


def test_published_start():
    """Xavier over the three input matrices of an attention together; layers start with the same MLP biases."""
    config = detr.get_config("r50")
    config.model.encoder.num_layers = config.model.decoder.num_layers = 2
    start = start_beside_backbone(config)
    bounds = {  # path below encoder/layers/layers: bound of its uniform range
        "attention/query/kernel": math.sqrt(6 / 1024),
        "attention/key/kernel": math.sqrt(6 / 1024),
        "attention/value/kernel": math.sqrt(6 / 1024),
        "attention/out/kernel": math.sqrt(6 / 512),
        "mlp/layers/0/kernel": math.sqrt(6 / 2304),
        "mlp/layers/1/kernel": math.sqrt(6 / 2304),
        "mlp/layers/0/bias": 1 / math.sqrt(256),
        "mlp/layers/1/bias": 1 / math.sqrt(2048),
    }
    for path, bound in bounds.items():
        values = start[f"encoder/layers/layers/{path}"]
        assert 0.98 * bound < np.abs(values).max() <= bound
        assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.1
        equal = np.array_equal(values[0], values[1])
        assert equal == path.endswith("bias")
    for attention in ("self_attention", "cross_attention"):
        assert np.abs(start[f"decoder/layers/layers/{attention}/key/kernel"]).max() <= math.sqrt(6 / 1024)
        for layer in ("query", "key", "value", "out"):
            assert not start[f"decoder/layers/layers/{attention}/{layer}/bias"].any()
    assert abs(start["decoder/query_position"].std() - 1) < 0.02
    assert 0.98 / 16 < np.abs(start["heads/class_head/linear/bias"]).max() <= 1 / 16


def test_group_norm_backbone_and_padding():
    """The tiny models train from scratch with group norm, whose features know the padding: the same images in a larger
    frame get the same answer."""
    fields = {"backbone__depth": 18, "backbone__width": 8, "backbone__norm": "group_norm", "backbone__frozen_stages": 0}
    detector = build(ResNet, strides=(8,), **fields)
    image, valid = example()
    pad = ((0, 0), (0, 32), (0, 64))
    near = detector(image, valid)
    far = detector(np.pad(image, (*pad, (0, 0))), np.pad(valid, pad))
    assert near.logits.shape == (2, 2, 7, 6) and near.boxes.shape == (2, 2, 7, 4)
    np.testing.assert_allclose(near.logits, far.logits, atol=2e-5)
    np.testing.assert_allclose(near.boxes, far.boxes, atol=2e-6)
    assert np.abs(near.logits[:, 0] - near.logits[:, 1]).max() > 0.1  # the images do matter


def test_dropout_needs_a_key():
    answer, again = (build()(*example()) for _ in range(2))
    np.testing.assert_array_equal(again.logits, answer.logits)
    detector = build(dropout=0.5)
    np.testing.assert_array_equal(detector(*example()).logits, answer.logits)
    one, same, other = (detector(*example(), jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.logits, same.logits)
    assert np.abs(one.logits - other.logits).max() > 0.01
    assert np.abs(one.logits - answer.logits).max() > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_norm": True},
        {"position__encoder": "none"},
        {"position__encoder": "input"},
        {"position__decoder": "none"},
        {"position__decoder": "input"},
        {"decoder__query_position": "input"},
        {"encoder__num_layers": 0},
        {"encoder__mlp_dim": 0},
        {"decoder__mlp_dim": 0},
        {"position__encoding": "learned"},
    ],
)
def test_every_ablation_computes_something_of_its_own(changes):
    answer, published = build(**changes)(*example()), build()(*example())
    assert np.isfinite(answer.logits).all() and np.isfinite(answer.boxes).all()
    assert np.abs(answer.logits - published.logits).max() > 1e-4


@pytest.mark.parametrize("pre_norm", [False, True])
def test_bfloat16_computes_nearly_the_same(pre_norm):
    changes = {"pre_norm": True} if pre_norm else {}
    exact, answer = build(**changes)(*example()), build(precision="bfloat16", **changes)(*example())
    assert answer.logits.dtype == answer.boxes.dtype == jnp.float32
    assert 1e-4 < np.abs(answer.boxes - exact.boxes).max() < 0.1


@pytest.fixture(scope="module")
def halves():
    """An encoder followed by a decoder, with random parameters, and tokens, positions and a mask for them.

    decode(tokens, position, valid, query_position) -> (memory, decoded); a None position is no position.
    """
    shared = dict(num_heads=2, mlp_dim=24, pre_norm=False, dropout=0.0, compute=FLOAT32)

    class Halves(nnx.Module):
        def __init__(self, rngs):
            self.encoder = TransformerEncoder(16, num_layers=2, rngs=rngs, **shared)
            self.decoder = TransformerDecoder(16, 5, num_layers=2, query_position="attention", rngs=rngs, **shared)

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Halves(nnx.Rngs(0))))
    state = random_numbers(abstract)

    @jax.jit
    def decode(tokens, position, valid, query_position):
        both = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
        both.decoder.query_position[...] = query_position
        memory = both.encoder(tokens, position, valid)
        return memory, both.decoder(memory, position, valid)

    rng = np.random.default_rng(1)
    tokens, position = (rng.standard_normal((2, 9, 16)).astype(np.float32) for _ in range(2))
    valid = np.arange(9)[None] < np.array([[9], [6]])
    query_position = rng.standard_normal((5, 16)).astype(np.float32)
    return lambda *arguments: jax.device_get(decode(*arguments)), tokens, position, valid, query_position


def test_without_position_tokens_are_a_set(halves):
    """Any order of the tokens gives the same answer, unless a position encoding tells them apart."""
    decode, tokens, position, valid, query_position = halves
    order = np.random.default_rng(1).permutation(9)
    _, plain = decode(tokens, None, valid, query_position)
    _, shuffled = decode(tokens[:, order], None, valid[:, order], query_position)
    np.testing.assert_allclose(shuffled, plain, atol=1e-5)
    _, placed = decode(tokens, position, valid, query_position)
    _, moved = decode(tokens[:, order], position, valid[:, order], query_position)
    assert np.abs(moved - placed).max() > 0.01


def test_padding_is_no_key(halves):
    """What stands in padded tokens does not reach real ones, in either half."""
    decode, tokens, position, valid, query_position = halves
    memory, decoded = decode(tokens, position, valid, query_position)
    changed, same = decode(np.where(valid[..., None], tokens, np.float32(100)), position, valid, query_position)
    np.testing.assert_array_equal(memory[1, :6], changed[1, :6])
    assert np.abs(memory[1, 6:] - changed[1, 6:]).max() > 0.01
    np.testing.assert_array_equal(decoded, same)


def test_queries_follow_their_positions(halves):
    """The answer of a query belongs to its learned position, wherever in the row it stands."""
    decode, tokens, position, valid, query_position = halves
    order = np.array([3, 1, 4, 0, 2])
    _, decoded = decode(tokens, position, valid, query_position)
    _, reordered = decode(tokens, position, valid, query_position[order])
    np.testing.assert_allclose(reordered, decoded[:, :, order], atol=1e-5)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"position__encoder": "keys"}, "config.model.position.encoder is 'keys'; it can be attention, input or none."),
        ({"position__decoder": "keys"}, "config.model.position.decoder is 'keys'"),
        ({"position__encoding": "cosine"}, "config.model.position.encoding is 'cosine'"),
        ({"decoder__num_layers": 0}, "config.model.decoder.num_layers is 0; it must be at least 1."),
        ({"decoder__query_position": "none"}, "config.model.decoder.query_position is 'none'"),
        ({"embed_dim": 33, "encoder__num_heads": 3, "decoder__num_heads": 3}, "config.model.embed_dim is 33"),
        ({"encoder__num_heads": 3}, "num_heads is 3; it must divide"),
    ],
)
def test_bad_fields_are_named(changes, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        abstract_detector(small(**changes))

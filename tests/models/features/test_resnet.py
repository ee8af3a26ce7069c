"""The backbone: sizes, paddings and freezing by hand; values of the published networks are in the golden tests."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.features.resnet import (
    Block,
    Bottleneck,
    Conv,
    DeformableConv,
    Frozen,
    FrozenBatchNorm,
    GroupNorm,
    ResNet,
    Stage,
)
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import convolution
from deperceiver_jax.weights.name_rules import NameRules, to_torch, torch_shapes
from deperceiver_jax.weights.tables.parts import resnet_rules
from tests.drawn_arrays import FLOAT32, answer_of
from tests.seeded import seeded_state_dict
from tests.torch_state import load_torch_state

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "backbone.npz")


def resnet(depth=18, *, width=4, strides=(32,), norm="frozen_batch_norm", frozen_stages=2, **kwargs):
    fields = dict(depth=depth, width=width, strides=strides, norm=norm, frozen_stages=frozen_stages)
    others = dict(dilation=False, groups=1, inner_ratio=1, deformable_stages=0, compute=FLOAT32, rngs=nnx.Rngs(0))
    return ResNet(**fields, **{**others, **kwargs})


def abstract(*args, **kwargs):
    """A network without values."""
    return nnx.eval_shape(lambda: resnet(*args, **kwargs))


def seeded(*args, **kwargs):
    """A network whose every array is drawn by its name: nothing is one or zero."""
    network = abstract(*args, **kwargs)
    rules = NameRules(tuple(resnet_rules()))
    load_torch_state(network, seeded_state_dict(torch_shapes(network, rules)), rules)
    return network


def feature_shapes(network, height, width):
    graphdef, state = nnx.split(network)
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    features = jax.eval_shape(lambda state, image: nnx.merge(graphdef, state)(image), state, image)
    return {stride: x.shape for stride, x in features.items()}


def random_image(*shape):
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("depth", "inner", "count", "channels"),
    [
        (18, {}, 11_176_512, 64),
        (34, {}, 21_284_672, 64),
        (50, {}, 23_508_032, 256),
        (101, {}, 42_500_160, 256),
        (50, {"groups": 32, "inner_ratio": 2}, 22_979_904, 256),
        (101, {"groups": 64, "inner_ratio": 4}, 81_406_272, 256),
    ],
)
def test_published_sizes(depth, inner, count, channels):
    """Weights and batch norm scales and biases of torchvision's networks without their classifier, ResNeXts last."""
    network = abstract(depth, width=64, strides=(4, 8, 16, 32), **inner)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(network))}
    trained = [leaf for path, leaf in leaves.items() if not path.endswith(("mean", "var"))]
    assert sum(np.prod(leaf.get_value().shape) for leaf in trained) == count
    assert network.channels == {4: channels, 8: 2 * channels, 16: 4 * channels, 32: 8 * channels}
    assert all(leaf.get_value().dtype == jnp.float32 for leaf in leaves.values())


@pytest.mark.parametrize(("strides", "stages"), [((4,), 1), ((8, 16), 3), ((8, 16, 32), 4)])
def test_features_by_stride(strides, stages):
    """Every stride-2 layer halves and rounds up; stages after the last wanted one do not exist."""
    network = abstract(strides=strides)
    assert len(network.stages) == stages and set(network.channels) == set(strides)
    sizes = {4: (25, 33), 8: (13, 17), 16: (7, 9), 32: (4, 5)}
    assert feature_shapes(network, 97, 131) == {
        stride: (2, *sizes[stride], network.channels[stride]) for stride in strides
    }


def test_dilation_keeps_stride_16():
    """DC5: layer4.0 has dilation 1 and stride 1, the later blocks dilation 2; its features stand at stride 16."""
    network = abstract(50, strides=(8, 16), dilation=True)
    last = network.stages[3]
    assert (last.first.conv2.stride, last.first.conv2.dilation, last.first.shortcut_conv.stride) == (1, 1, 1)
    assert last.rest.layers.conv2.dilation == 2
    assert network.channels == {8: 32, 16: 128}
    assert feature_shapes(network, 65, 48) == {8: (2, 9, 6, 32), 16: (2, 5, 3, 128)}


def convolve_by_hand(x, kernel, stride, dilation, padding):
    """[H, W, C] with the kernel [k, k, C, D], padding on every side: a sum over shifted images."""
    size = kernel.shape[0]
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    height, width = ((n + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for n in x.shape[:2])
    y = 0
    for i in range(size):
        for j in range(size):
            rows = slice(i * dilation, i * dilation + stride * (height - 1) + 1, stride)
            columns = slice(j * dilation, j * dilation + stride * (width - 1) + 1, stride)
            y = y + padded[rows, columns] @ kernel[i, j]
    return y


@pytest.mark.parametrize(("size", "stride", "dilation"), [(7, 2, 1), (3, 2, 1), (3, 1, 2), (1, 2, 1), (3, 1, 1)])
def test_padding_is_symmetric(size, stride, dilation):
    conv = Conv(3, 5, size, stride=stride, dilation=dilation, frozen=False, compute=FLOAT32, rngs=nnx.Rngs(0))
    for shape in ((12, 9), (11, 10)):
        image = random_image(1, *shape)
        expected = convolve_by_hand(image[0], np.asarray(conv.kernel[...]), stride, dilation, size // 2 * dilation)
        np.testing.assert_allclose(answer_of(conv, image)[0], expected, atol=1e-5)


def test_a_stage_of_torchvisions_resnext():
    """Values, and the gradients of the input and of every kernel; see golden/README.md."""
    golden = {n.removeprefix("resnext_stage/"): GOLDEN[n] for n in GOLDEN if n.startswith("resnext_stage/")}
    how = dict(bottleneck=Bottleneck(4, 2, deformable=False), stride=2, dilation=1, frozen=False)

    def make_norm(dim, last=False):
        return FrozenBatchNorm(dim, dtype=jnp.float32)

    def make():
        return Stage(16, 8, 2, make_norm=make_norm, compute=FLOAT32, rngs=nnx.Rngs(0), **how)

    stage = nnx.eval_shape(make)
    rules = NameRules(tuple(rule._replace(path=rule.path.removeprefix("stages/1/")) for rule in resnet_rules()))
    load_torch_state(stage, seeded_state_dict(torch_shapes(stage, rules)), rules)
    graphdef, kernels, rest = nnx.split(stage, nnx.Param, ...)
    x, y, cotangent = (golden[name].transpose(0, 2, 3, 1) for name in ("x", "y", "cotangent"))

    @jax.jit
    def value_and_gradients(kernels, x):
        ours, backward = jax.vjp(lambda kernels, x: nnx.merge(graphdef, kernels, rest)(x, None), kernels, x)
        return ours, *backward(cotangent)

    ours, of_kernels, of_x = value_and_gradients(kernels, x)
    np.testing.assert_allclose(ours, y, atol=1e-5)
    np.testing.assert_allclose(of_x, golden["of_x"].transpose(0, 2, 3, 1), atol=1e-5)
    of_kernels = {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(of_kernels)}
    found = {f"of_{name}": array for name, array in to_torch(of_kernels, rules).items()}
    assert set(found) == set(golden) - {"x", "y", "cotangent", "of_x"} and len(found) == 7
    for name, array in found.items():
        np.testing.assert_allclose(array, golden[name], atol=2e-4 * np.abs(golden[name]).max(), err_msg=name)


@pytest.mark.parametrize(("strides", "stages"), [((32,), {"2", "3"}), ((8, 16), {"1", "2"})])
def test_deformable_stages_are_the_last_ones(strides, stages):
    network = abstract(50, strides=strides, groups=2, deformable_stages=2)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network, nnx.Param))]
    offsets = [re.match(r"stages/(\d)/(first|rest/layers)/conv2/offsets/", path) for path in paths if "offsets" in path]
    assert {match[1] for match in offsets} == stages and len(offsets) == 2 * 2 * 2  # kernels and biases


def test_a_deformable_convolution_starts_as_half_a_convolution():
    """Then the bias of the first channels moves where the first tap reads, by (x, y), and how much it counts."""
    how = dict(stride=1, dilation=1, groups=2, frozen=False, compute=FLOAT32)
    plain, conv = Conv(4, 6, 3, **how, rngs=nnx.Rngs(0)), DeformableConv(4, 6, 3, **how, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).standard_normal((1, 6, 7, 4)).astype(np.float32)
    np.testing.assert_array_equal(conv.kernel[...], plain.kernel[...])
    np.testing.assert_allclose(answer_of(conv, image), answer_of(plain, image) / 2, atol=1e-5)

    corner = np.zeros((3, 3, 1, 1), np.float32)
    corner[0, 0] = 1
    convolve = jax.jit(lambda kernel: convolution(image, kernel, 1, 1))
    others, first = (np.asarray(convolve(np.asarray(plain.kernel[...]) * part)) for part in (1 - corner, corner))
    bias = np.zeros(27, np.float32)
    bias[:3], bias[5::3] = (2.0, 1.0, -100.0), 100.0
    conv.offsets.bias.set_value(bias.copy())
    np.testing.assert_allclose(answer_of(conv, image), others, atol=1e-5)
    bias[2] = 100.0
    conv.offsets.bias.set_value(bias)
    moved = (answer_of(conv, image) - others)[:, 1:-1, 1:-2]  # but for edges, which the tap crosses in one of the two
    np.testing.assert_allclose(moved, first[:, 2:, 3:], atol=1e-5)


def test_frozen_batch_norm():
    norm = FrozenBatchNorm(2, dtype=jnp.float32)
    norm.scale.set_value(np.float32([2.0, 1.0]))
    norm.bias.set_value(np.float32([1.0, 0.0]))
    norm.mean.set_value(np.float32([3.0, 0.0]))
    norm.var.set_value(np.float32([4.0, 0.0]))
    y = answer_of(norm, np.float32([[[[5.0, 1e-2]]]]), None)
    np.testing.assert_allclose(y.ravel(), [1 + 2 * (5 - 3) / 2, 1e-2 / 1e-5**0.5], rtol=1e-5)


def test_group_norm_of_the_real_pixels():
    norm = GroupNorm(64, dtype=jnp.float32)
    assert norm.num_groups == 32 and GroupNorm(16, dtype=jnp.float32).num_groups == 8
    norm.bias.set_value(np.arange(64, dtype=np.float32))
    x = np.random.default_rng(1).normal(3, 2, (2, 4, 5, 64)).astype(np.float32)
    valid = np.ones((2, 4, 5), bool)
    valid[1, 3:] = valid[1, :, 2:] = False
    y = answer_of(norm, x, valid)
    for image, real, result in zip(x, valid, y, strict=True):
        groups = image[real].reshape(-1, 32, 2)
        mean, var = groups.mean((0, 2), keepdims=True), groups.var((0, 2), keepdims=True)
        expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(-1, 64) + np.arange(64)
        np.testing.assert_allclose(result[real], expected, rtol=1e-4, atol=1e-4)
        assert np.all(result[~real] == 0)
    np.testing.assert_allclose(answer_of(norm, x[:1], None), y[:1], atol=1e-5)


def test_group_norm_features_do_not_depend_on_padding():
    network = seeded(strides=(4, 16), norm="group_norm", frozen_stages=0, width=8)
    image = random_image(1, 50, 70)
    alone = answer_of(network, image, np.ones((1, 50, 70), bool))
    frame = np.zeros((1, 96, 128, 3), np.float32)
    valid = np.zeros((1, 96, 128), bool)
    frame[:, :50, :70], valid[:, :50, :70] = image, True
    padded = answer_of(network, frame, valid)
    for stride, features in alone.items():
        height, width = features.shape[1:3]
        np.testing.assert_allclose(padded[stride][:, :height, :width], features, atol=1e-5)
        assert np.all(padded[stride][:, height:] == 0) and np.all(padded[stride][:, :, width:] == 0)
    unmasked = answer_of(network, frame, np.ones_like(valid))
    assert np.max(np.abs(unmasked[4][:, :13, :18] - alone[4])) > 1e-2


def test_blocks_of_a_new_group_norm_network_are_identities():
    block = Block(
        16,
        4,
        bottleneck=Bottleneck(1, 1, deformable=False),
        make_norm=lambda dim, last=False: GroupNorm(dim, initial_scale=0.0 if last else 1.0, dtype=jnp.float32),
        frozen=False,
        compute=FLOAT32,
        rngs=nnx.Rngs(0),
    )
    x = np.abs(np.random.default_rng(0).standard_normal((1, 4, 4, 16))).astype(np.float32)
    np.testing.assert_array_equal(answer_of(block, x, None), x)


def gradient_program(network):
    """(the jaxpr of a loss and its gradient by the trained parameters, how many such arrays there are)."""
    graphdef, trained, rest = nnx.split(network, nnx.Param, ...)
    image = random_image(1, 64, 64)

    def loss(trained):
        return sum(jnp.sum(x**2) for x in nnx.merge(graphdef, trained, rest)(image).values())

    program = jax.make_jaxpr(jax.value_and_grad(loss))(trained).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))  # as compilers do
    return program, len(jax.tree.leaves(trained))


def count_convolutions(jaxpr) -> int:
    """Convolutions that a program runs, those of its loops as often as they turn, on a TPU."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "conv_general_dilated"
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [
            jaxpr for jaxpr in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr) if is_jaxpr(jaxpr)
        ]
        if equation.primitive.name == "cond":
            inner = inner[-1:]  # the first is a CPU's
        count += times * sum(count_convolutions(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in inner)
    return count


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@pytest.mark.parametrize("frozen_stages", [0, 1, 2, 4, 5])
def test_no_backward_pass_through_frozen_stages(frozen_stages):
    """A frozen convolution runs once; a trained one also for its kernel and, but for the first, for its input."""
    convolutions = (1, 4, 5, 5, 5)  # of the stem and the stages of ResNet-18, shortcuts included
    network = seeded(frozen_stages=frozen_stages)
    program, num_trained = gradient_program(network)
    forward, trained = sum(convolutions), sum(convolutions[frozen_stages:])
    # The first trained stage's input gets no gradient: it enters that stage's first convolution and its shortcut.
    entering = {0: 1, 1: 1, 2: 2, 4: 2, 5: 0}[frozen_stages]
    assert count_convolutions(program) == forward + 2 * trained - entering
    stacked = (1, 2, 2, 2, 2)  # the second block of a stage is a stack of one block: two kernels
    first_blocks = (0, 2, 3, 3, 3)
    assert num_trained == sum((a + b for a, b in zip(stacked, first_blocks, strict=True)), 0) - sum(
        a + b for a, b in zip(stacked[:frozen_stages], first_blocks[:frozen_stages], strict=True)
    )


def test_what_is_frozen():
    """With frozen batch norm only kernels are trained; frozen stages have no trained parameter at all."""
    network = abstract(50, frozen_stages=2)
    trained = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network, nnx.Param))]
    frozen = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(network, Frozen))]
    assert len(trained) + len(frozen) == len(nnx.to_flat_state(nnx.state(network)))
    assert all(
        re.fullmatch(r"stages/[123]/(first|rest/layers)/(conv\d|shortcut_conv)/kernel", path) for path in trained
    )
    assert "stem_conv/kernel" in frozen and "stages/0/rest/layers/conv3/kernel" in frozen
    everything = abstract(50, norm="group_norm", frozen_stages=0)
    assert not nnx.to_flat_state(nnx.state(everything, Frozen))


def test_kaiming_start():
    conv = Conv(64, 32, 3, frozen=False, compute=FLOAT32, rngs=nnx.Rngs(0))
    assert abs(np.std(conv.kernel[...]) / (2 / (32 * 9)) ** 0.5 - 1) < 0.03
    first, second = resnet(34, strides=(4,)).stages[0].rest.layers.conv1.kernel[...]
    assert np.abs(first - second).max() > 0  # the layers of a stack start apart


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    image = random_image(1, 64, 64)
    exact = answer_of(seeded(width=8, strides=(4, 8)), image)
    rough = answer_of(
        seeded(width=8, strides=(4, 8), compute=Compute(jnp.bfloat16, "auto", rematerialize=False)), image
    )
    for stride in (4, 8):
        assert rough[stride].dtype == jnp.bfloat16
        error = np.linalg.norm(rough[stride].astype(np.float32) - exact[stride]) / np.linalg.norm(exact[stride])
        assert 1e-4 < error < 3e-2


def test_scanned_and_unrolled_blocks_agree():
    """What runs on a CPU and what the other platforms compile."""
    network = seeded(34, width=8, strides=(8,))
    image = random_image(1, 40, 40)
    unrolled = answer_of(network, image)[8]
    for stage in network.stages:
        assert stage.rest.unroll_on_cpu
        stage.rest.unroll_on_cpu = False
    np.testing.assert_allclose(answer_of(network, image)[8], unrolled, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 152}, "config.model.backbone.depth is 152; it can be 18, 34, 50 or 101"),
        ({"norm": "batch"}, "norm is 'batch'; it can be frozen_batch_norm or group_norm"),
        ({"frozen_stages": 6}, "frozen_stages is 6; it can be 0 to 5"),
        ({"norm": "group_norm"}, "group_norm, which trains from scratch, but frozen_stages is 2"),
        ({"width": 3}, "width is 3; it must be an even number"),
        ({"groups": 2}, "groups needs bottlenecks .depth 50 or 101., not depth 18"),
        ({"inner_ratio": 2}, "inner_ratio needs bottlenecks"),
        ({"groups": 0}, "groups is 0; it must be at least 1"),
        ({"groups": 3, "depth": 50}, "groups is 3, which does not divide the 4 channels of the first 3x3"),
        ({"deformable_stages": 1}, "deformable_stages needs bottlenecks"),
        ({"deformable_stages": -1, "depth": 50}, "deformable_stages is -1; it must be at least 0"),
        (
            {"deformable_stages": 4, "depth": 50},
            "deformable_stages is 4, but only 3 of the 4 stages that config.model.strides needs are trained",
        ),
        ({"strides": (16, 64)}, "config.model.strides is .16, 64.; a ResNet has the strides 4, 8, 16, 32"),
        ({"strides": ()}, "config.model.strides is .."),
        ({"dilation": True, "depth": 18, "strides": (16,)}, "dilation needs bottleneck blocks"),
        ({"dilation": True, "depth": 50}, "a ResNet with dilation has the strides 4, 8, 16"),
        ({"dilation": True, "depth": 50, "strides": (8,)}, "dilation changes only stride 16, which .* lacks"),
    ],
)
def test_bad_fields(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        resnet(**changes)

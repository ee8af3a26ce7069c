"""Official names and layouts: every parameter has one, both ways, and whatever does not fit is named."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from configs import deperceiver
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.features.resnet import ResNet
from deperceiver_jax.models.layers.arrays import over_arrays, shape_of
from deperceiver_jax.models.layers.initializers import Undrawn
from deperceiver_jax.weights.backbone import load_backbone
from deperceiver_jax.weights.name_rules import NameRules, Rule, torch_shapes
from deperceiver_jax.weights.tables import FAMILIES
from deperceiver_jax.weights.tables.parts import resnet_rules
from tests.drawn_arrays import FLOAT32, abstract_detector
from tests.seeded import seeded_array, seeded_state_dict
from tests.torch_state import load_torch_state, to_torch_state

AUXILIARY = {"num_layers": 3, "self_attention": True, "final_norm": True}


def tiny(variant="r50_16", **decoder):
    """A published DePerceiver with few channels and latents; the names are those of the full size."""
    config = deperceiver.get_config(variant)
    config.model.backbone.width = 2
    config.model.embed_dim = config.model.encoder.latent_dim = 32
    config.model.encoder.num_latents = 6
    config.model.num_queries = 5
    config.model.decoder.update(decoder)
    return config


def build(config):
    """(a detector without values, its rules)."""
    detector = abstract_detector(config)
    return detector, FAMILIES[config.model.name](config.model)


def seeded(config):
    """(a detector with the seeded values, its rules, the state dict it has them from)."""
    detector, rules = build(config)
    state = seeded_state_dict(torch_shapes(detector, rules))
    load_torch_state(detector, state, rules)
    return detector, rules, state


def values(module):
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.mark.parametrize(
    ("variant", "decoder", "count"),
    [
        ("r50_32", {}, 409),
        ("r50_16", {}, 359),
        ("r50_8", {}, 264),
        ("r50_4", {}, 199),
        ("r50_multiscale", {}, 416),
        ("r50_32", AUXILIARY, 477),
    ],
)
def test_a_state_dict_comes_back_as_it_went_in(variant, decoder, count):
    """Counts are those of the published state dicts, without the loss's buffer."""
    detector, rules = build(tiny(variant, **decoder))
    state = seeded_state_dict(torch_shapes(detector, rules))
    assert len(state) == count
    extra = {
        "criterion.empty_weight": np.ones(92, np.float32),
        "backbone.backbone.body.bn1.num_batches_tracked": np.array(3),
    }
    report = load_torch_state(detector, {**state, **extra}, rules)
    assert report.loaded == sorted(state) and set(report.ignored) == set(extra)
    back = to_torch_state(detector, rules)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_layouts():
    """One array of each kind, with our axes written out."""
    detector, _, state = seeded(tiny("r50_multiscale", **AUXILIARY))
    ours = {"/".join(map(str, path)): array for path, array in values(detector).items()}
    body = "backbone.backbone.body."
    for path, expected in {
        "backbone/stem_conv/kernel": state[f"{body}conv1.weight"].transpose(2, 3, 1, 0),
        "backbone/stages/2/first/shortcut_norm/var": state[f"{body}layer3.0.downsample.1.running_var"],
        "backbone/stages/2/rest/layers/conv2/kernel": np.stack(
            [state[f"{body}layer3.{b}.conv2.weight"].transpose(2, 3, 1, 0) for b in range(1, 6)]
        ),
        "levels/projections/1/kernel": state["input_proj.1.weight"][:, :, 0, 0].T,
        "levels/level_embedding": np.concatenate([state[f"scale_embedding.{i}.weight"] for i in range(3)]),
        "encoder/blocks/layers/attention/query/kernel": np.stack(
            [state[f"perceiver.encoder.self_attention_block.{i}.attention.q.weight"].T for i in range(6)]
        ),
        "decoder/layers/layers/cross_attention/mlp_norm/scale": np.stack(
            [state[f"perceiver.decoder.layers.{i}.cross_attention.qkv_layer_norm.weight"] for i in range(3)]
        ),
        "heads/box_head/mlp/layers/2/bias": state["bbox_embed.layers.2.bias"],
    }.items():
        np.testing.assert_array_equal(ours[path], expected, err_msg=path)


def test_what_does_not_fit_is_named_and_changes_nothing():
    detector, rules, state = seeded(tiny())
    before = values(detector)

    def refuse(sentence, **changes):
        changed = {name: array for name, array in {**state, **changes}.items() if array is not None}
        with pytest.raises(UserError, match=sentence):
            load_torch_state(detector, changed, rules, source="x.ckpt")
        for path, array in values(detector).items():
            np.testing.assert_array_equal(array, before[path])

    refuse("x.ckpt lacks query_embed.weight, which this model needs", **{"query_embed.weight": None})
    refuse("x.ckpt holds surprise, which this model does not have", surprise=np.zeros(3))
    refuse("x.ckpt holds a, b, c and 1 more, which this model does not have", **{name: np.zeros(3) for name in "abcd"})
    refuse(
        r"perceiver.encoder.latents has the shape \[7, 32\] in x.ckpt and \[6, 32\] in this model",
        **{"perceiver.encoder.latents": np.zeros((7, 32), np.float32)},
    )


def test_models_that_were_never_published_have_no_names():
    for field, value in {"encoder.num_cross_attentions": 2, "position.encoding": "learned"}.items():
        config = tiny()
        config.model.update_from_flattened_dict({field: value})
        detector, rules = build(config)
        with pytest.raises(UserError, match="This model has .*, for which the published checkpoints have no name"):
            torch_shapes(detector, rules)


def test_values_take_the_type_of_the_parameter():
    class One(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((2, 3)))

    module, rules = One(), NameRules((Rule("kernel", "w"),))
    load_torch_state(module, {"w": np.ones((2, 3), np.float16)}, rules)
    assert module.kernel.dtype == jnp.float32 and float(module.kernel[...].sum()) == 6


@pytest.mark.parametrize("depth, groups", [(18, 1), (50, 1), (50, 4)])
@pytest.mark.parametrize("prefix", ["", "backbone.0.body.", "backbone.backbone.body.", "module."])
def test_pretrained_backbones(tmp_path, depth, groups, prefix):
    """A whole torchvision network, or a detector's backbone, into one that ends at stride 16.

    The last network is a ResNeXt, into one whose last stage is deformable: its offsets start anew.
    """

    def resnet(strides, deformable_stages):
        return ResNet(
            depth=depth,
            width=2,
            strides=strides,
            norm="frozen_batch_norm",
            frozen_stages=2,
            dilation=False,
            groups=groups,
            inner_ratio=groups,
            deformable_stages=deformable_stages,
            compute=FLOAT32,
            rngs=Undrawn(),
        )

    sizes = ((32,), 0), ((8, 16), int(groups > 1))
    whole, part = (over_arrays(shape_of, resnet(*size)) for size in sizes)
    rules = NameRules(tuple(resnet_rules()))
    shapes = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(part))}
    state = seeded_state_dict(torch_shapes(whole, rules))
    if prefix == "":
        state |= {"fc.weight": np.zeros((9, 4), np.float32), "fc.bias": np.zeros(9, np.float32)}
        state["layer1.0.bn1.num_batches_tracked"] = np.array(1)
    file = {f"{prefix}{name}": array for name, array in state.items()}
    if prefix not in ("", "module."):
        file["class_embed.weight"] = np.zeros((2, 2), np.float32)
    path = tmp_path / "resnet.safetensors"
    safetensors.numpy.save_file(file, path)

    detector_shapes = {f"backbone/{name}": shape for name, shape in shapes.items()} | {"heads/bias": (4,)}
    arrays = load_backbone(path, detector_shapes)
    offsets = {name for name in detector_shapes if "/conv2/offsets/" in name}
    assert len(offsets) == (4 if groups > 1 else 0)
    assert {name: array.shape for name, array in arrays.items()} == {
        name: shape for name, shape in detector_shapes.items() if name not in {*offsets, "heads/bias"}
    }
    np.testing.assert_array_equal(
        arrays["backbone/stages/2/rest/layers/norm2/mean"][0], state["layer3.1.bn2.running_mean"]
    )
    kernel = state["layer3.0.conv2.weight"]
    assert kernel.shape[:2] == (8 * groups, 8)  # of width 2
    np.testing.assert_array_equal(arrays["backbone/stages/2/first/conv2/kernel"], kernel.transpose(2, 3, 1, 0))


def test_wrong_backbones(tmp_path):
    path = tmp_path / "x.safetensors"
    shapes = {"backbone/stem_conv/kernel": (7, 7, 3, 4)}
    safetensors.numpy.save_file({"conv.weight": np.zeros(3)}, path)
    with pytest.raises(UserError, match=r"x\.safetensors holds no ResNet: conv1.weight is not in it"):
        load_backbone(path, shapes)
    safetensors.numpy.save_file({"conv1.weight": np.zeros((4, 3, 7, 7)), "bn1.running_mean": np.zeros(4)}, path)
    with pytest.raises(UserError, match=r"holds bn1.running_mean, which this model does not have"):
        load_backbone(path, shapes)  # batch norm's statistics, and a network without

    first = "backbone/stages/0/first"
    shapes |= {f"{first}/conv2/kernel": (3, 3, 4, 4), f"{first}/conv3/kernel": (1, 1, 4, 16)}
    state = {
        "conv1.weight": (4, 3, 7, 7),
        "layer1.0.conv2.weight": (8, 2, 3, 3),
        "layer1.0.conv3.weight": (16, 8, 1, 1),
    }
    safetensors.numpy.save_file({name: np.zeros(shape) for name, shape in state.items()}, path)
    fields = "config.model.backbone.groups=4 and config.model.backbone.inner_ratio=2"
    with pytest.raises(UserError, match=f"x.safetensors is another one; it fits with {fields}."):
        load_backbone(path, shapes)  # a ResNeXt, and a ResNet of the same width


def test_seeded_arrays():
    """A function of seed, name and shape alone, with the sizes that keep activations of order one."""
    name = "perceiver.encoder.cross_attn.attention.v.weight"
    array = seeded_array(name, (64, 64))
    np.testing.assert_array_equal(array, seeded_array(name, (64, 64)))
    assert not np.array_equal(array, seeded_array(name, (64, 64), seed=1))
    assert not np.array_equal(array, seeded_array(name.replace("v", "w"), (64, 64)))
    assert array.dtype == np.float32 and abs(array.std() * 8 - 1) < 0.05
    np.testing.assert_allclose(
        array[0, :3], (0.07296488, 0.009087786, -0.11248769), rtol=1e-6
    )  # golden files rest on it
    assert np.all(seeded_array("bn1.running_var", (1000,)) > 0)

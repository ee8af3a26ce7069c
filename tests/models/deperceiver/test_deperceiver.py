"""Each field of config.model has its one effect; a config that cannot be built says why in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import deperceiver
from deperceiver_jax import UserError, build_detector
from tests.drawn_arrays import Patches, abstract_detector, answer_of, drawn_detector


def small_config(variant="r50_16"):
    config = deperceiver.get_config(variant)
    model = config.model
    model.num_classes, model.num_queries, model.embed_dim = 5, 7, 32
    model.backbone.update(depth=18, width=8)
    model.encoder.update(num_latents=6, latent_dim=32, layers_per_block=2, num_blocks=2)
    return config


def parameters(config):
    return nnx.to_flat_state(nnx.state(build_detector(config, rngs=nnx.Rngs(0)), nnx.Param))


def shapes(config):
    state = nnx.state(abstract_detector(config, Patches))
    return {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def example():
    """(image, valid)"""
    image = np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32)
    valid = np.ones(image.shape[:3], bool)
    valid[1, 40:] = False
    return image, valid


def predict(config):
    return answer_of(drawn_detector(config), *example())


def test_published_model_has_the_published_number_of_parameters():
    """Reference: the official code's counts, 1024 latents; trainable parameters."""
    for variant, count in {"r50_32": 27_368_288, "r50_8": 4_954_976, "r50_4": 3_677_024}.items():
        config = deperceiver.get_config(variant)
        config.model.encoder.num_latents = 1024
        state = nnx.state(abstract_detector(config), nnx.Param)
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state)) == count, variant


def test_remedies_change_what_they_say():
    base = shapes(small_config())
    encoder = "encoder/blocks/layers/"
    assert base["encoder/latents"] == (6, 32)
    assert base[f"{encoder}mlp/layers/0/kernel"] == (2, 32, 32)

    def with_fields(**fields):
        config = small_config()
        config.update_from_flattened_dict({f"model.{k.replace('__', '.')}": v for k, v in fields.items()})
        return shapes(config)

    assert with_fields(encoder__mlp_ratio=4.0)[f"{encoder}mlp/layers/0/kernel"] == (2, 32, 128)
    assert with_fields(encoder__share_blocks=False)[f"{encoder}mlp/layers/0/kernel"] == (4, 32, 32)
    assert with_fields(encoder__latent_dim=64)["encoder/latents"] == (6, 64)
    assert "encoder/cross_attentions/1/attention/query/kernel" in with_fields(encoder__num_cross_attentions=2)
    assert with_fields(decoder__num_layers=3)["decoder/layers/layers/cross_attention/mlp_norm/scale"] == (3, 32)
    assert any("decoder/layers/layers/self_attention/" in path for path in with_fields(decoder__self_attention=True))
    fourier = with_fields(position__encoding="fourier", position__fourier_bands=5)
    assert fourier["levels/position/projection/kernel"] == (22, 32)


def test_scales_at_the_start():
    config = small_config()
    config.model.encoder.num_latents, config.model.num_queries = 400, 400
    config.model.encoder.update(latent_init="truncated_normal", latent_scale=0.02)
    values = {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in parameters(config)}
    # As in Perceiver IO's official code: cut at two standard deviations, which leaves 0.88 of the spread.
    assert np.abs(values["encoder/latents"]).max() <= 0.04 + 1e-6
    assert np.std(values["encoder/latents"]) == pytest.approx(0.88 * 0.02, rel=0.05)
    assert np.std(values["decoder/query_position"]) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("use", ["add", "keys"])
def test_multiscale_tells_levels_and_places_apart(use):
    config = small_config("r50_multiscale")
    config.model.position.use = use
    # A shifted image must not look the same: the position reaches the answer.
    image = np.zeros((2, 64, 96, 3), np.float32)
    image[0, :32, :32] = image[1, 32:, 32:64] = 3.0
    boxes = answer_of(drawn_detector(config), image, np.ones(image.shape[:3], bool)).boxes
    assert boxes.shape == (1, 2, 7, 4) and np.abs(boxes[:, 0] - boxes[:, 1]).max() > 1e-6


def test_layers_without_and_with_auxiliary_outputs_are_the_decoder_depth_alone():
    config = small_config()
    config.model.decoder.update(num_layers=3, self_attention=True, residual="content", final_norm=True)
    deep = predict(config)
    assert deep.logits.shape == (3, 2, 7, 6)
    config.loss.auxiliary = True
    np.testing.assert_array_equal(predict(config).logits, deep.logits)


def test_residuals_make_queries_differ_when_latents_start_small():
    """With small latents and no residual all queries answer alike; the query residual tells them apart."""

    def spread(residual):
        config = small_config()
        config.model.decoder.residual = residual
        detector = drawn_detector(config)
        detector.encoder.latents[...] *= 1e-3
        return np.std(answer_of(detector, *example()).boxes[0], axis=1).mean()

    assert spread("query") > 20 * spread("none")


def latents_as_queries(**changes):
    config = small_config()
    config.model.decoder.num_layers = 0
    config.model.encoder.update(num_latents=7, mlp_ratio=4.0, gated_mlp=True)
    config.update_from_flattened_dict({f"model.{k.replace('__', '.')}": v for k, v in changes.items()})
    return config


def test_latents_can_be_the_queries():
    config = latents_as_queries()
    found = shapes(config)
    assert not any(path.startswith("decoder/") for path in found)
    mlp = "encoder/blocks/layers/mlp/layers"  # a gate as wide as what it gates
    assert found[f"{mlp}/0/kernel"] == (2, 32, 256) and found[f"{mlp}/1/kernel"] == (2, 128, 32)
    detector = drawn_detector(config)
    boxes = np.asarray(answer_of(detector, *example()).boxes)
    assert boxes.shape == (1, 2, 7, 4)
    detector.encoder.latents[...] = np.asarray(detector.encoder.latents[...])[::-1]
    np.testing.assert_allclose(answer_of(detector, *example()).boxes, boxes[:, :, ::-1], atol=1e-5)
    config.model.decoder.final_norm = True
    assert "decoder/norm/scale" in shapes(config)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"encoder__num_latents": 8}, "8 latents of 32 channels and there are 7 queries of 32"),
        ({"encoder__latent_dim": 64}, "7 latents of 64 channels"),
        ({"decoder__depth": 2}, "config.model.decoder has depth, which does not exist there"),
        ({"relative_boxes": True, "decoder__anchors": True}, "needs config.model.decoder.num_layers of at least 1"),
    ],
)
def test_latents_that_cannot_be_the_queries(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        shapes(latents_as_queries(**changes))


def test_dropout_needs_a_key_and_is_its_function():
    config = small_config()
    config.model.dropout = config.model.decoder.dropout = 0.3
    detector = drawn_detector(config)

    def boxes(**options):
        return answer_of(detector, *example(), **options).boxes

    np.testing.assert_array_equal(boxes(), boxes())
    one, same, other = (boxes(dropout_key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-5


def test_bfloat16_computes_in_it_and_answers_in_float32():
    config = small_config()
    exact = predict(config)
    config.precision = "bfloat16"
    rough = predict(config)
    assert rough.logits.dtype == rough.boxes.dtype == jnp.float32
    assert all(variable.dtype == jnp.float32 for _, variable in parameters(config))
    assert 0 < np.abs(exact.boxes - rough.boxes).max() < 0.05


def test_tokens_of_several_strides_have_channels_for_their_level():
    config = small_config("r50_multiscale")
    for dim in (0, 32):
        config.model.level_dim = dim
        with pytest.raises(UserError, match=f"config.model.level_dim is {dim}; it can be 1 to 31 of"):
            abstract_detector(config)


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("name", "yolo", "it can be deperceiver, deperceiver_plus, detr, deformable_detr or smca"),
        ("position.use", "multiply", "add or keys"),
        ("encoder.self_heads", 5, "num_heads is 5; it must divide"),
        ("encoder.num_cross_attentions", 3, "with 2 blocks it can be 1 to 2"),
        ("encoder.latent_init", "uniform", "normal or truncated_normal"),
        ("decoder.residual", "all", "none, content or query"),
        ("decoder.self_attention_value", "key", "query or content"),
        ("backbone.depth", 20, "18, 34, 50 or 101"),
    ],
)
def test_a_wrong_value_is_named(field, value, sentence):
    config = small_config()
    config.update_from_flattened_dict({f"model.{field}": value})
    with pytest.raises(UserError, match=sentence):
        abstract_detector(config)


def test_fields_that_do_not_fit_are_named():
    config = small_config()
    config.model.num_points = 4
    with pytest.raises(UserError, match="config.model has num_points, which does not exist there"):
        abstract_detector(config)
    config = small_config()
    config.model.decoder.depth = 2
    with pytest.raises(UserError, match="config.model.decoder has depth, which does not exist there"):
        abstract_detector(config)
    config = small_config()
    del config.model.encoder.anchors
    with pytest.raises(UserError, match="config.model.encoder lacks anchors"):
        abstract_detector(config)


def test_unknown_variant_lists_the_valid_ones():
    with pytest.raises(ValueError, match="r50_32, r50_16"):
        deperceiver.get_config("r50_64")

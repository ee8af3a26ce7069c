"""DePerceiver+: shapes, gradients, places, padding, bad fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import deperceiver_plus
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.deperceiver_plus.denoising import Denoising, DenoisingQueries
from deperceiver_jax.structures import Targets
from tests.drawn_arrays import Patches, abstract_detector, answer_of, drawn_detector, extents_seen, new_detector

pytestmark = pytest.mark.slow


def small(**changes):
    """A DePerceiver+ of two narrow layers; `changes` are fields of config.model, __ for dots."""
    config = deperceiver_plus.get_config("r50_multiscale")
    fields = {"num_classes": 5, "num_queries": 7, "embed_dim": 32, "strides": (16, 32), "backbone.depth": 18}
    fields |= {"backbone.width": 8, "backbone.norm": "group_norm", "backbone.frozen_stages": 0}
    fields |= {"decoder.num_layers": 2, "decoder.num_heads": 4, "decoder.mlp_dim": 48}
    config.model.update_from_flattened_dict({**fields, **{k.replace("__", "."): v for k, v in changes.items()}})
    return config


def example(frame=(64, 96), size=(50, 70)):
    image = np.zeros((1, *frame, 3), np.float32)
    image[:, : size[0], : size[1]] = np.random.default_rng(0).standard_normal((*size, 3))
    valid = np.zeros((1, *frame), bool)
    valid[:, : size[0], : size[1]] = True
    return image, valid


PLAIN = {
    "denoising__copies": 0,
    "decoder__gaussian": False,
    "decoder__refine": False,
    "top_down": False,
    "neck_blocks": 0,
    "start": "learned",
}


@pytest.mark.parametrize(
    "changes", [{"decoder__separate_levels": True}, {**PLAIN, "strides": (32,), "box_deltas": "logits"}]
)
def test_every_parameter_learns(changes):
    config = small(**changes)
    graphdef, state = nnx.split(drawn_detector(config))
    image, valid = example()

    def total(state):
        predictions = nnx.merge(graphdef, state)(image, valid)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(predictions)), predictions

    gradients, predictions = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(state))
    assert predictions.logits.shape == (2, 1, 7, 5) and predictions.boxes.shape == (2, 1, 7, 4)
    assert (predictions.proposals is None) == (config.model.start == "learned")
    still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradients) if not g.any()]
    # A softmax does not see what is added to all its logits.
    assert all("'key'" in path and "'bias'" in path for path in still), still


@pytest.mark.parametrize("start", ["learned", "proposals"])
def test_padding_changes_nothing(start):
    """With proposals behind a backbone that is its own mean pixel."""
    detector = new_detector(small(start=start, strides=(8, 16)), None if start == "learned" else Patches)
    tight, wide = (answer_of(detector, *example(frame)) for frame in ((64, 96), (96, 128)))
    np.testing.assert_allclose(tight.boxes, wide.boxes, atol=1e-5)
    np.testing.assert_allclose(tight.logits, wide.logits, atol=1e-4)


def test_denoising_queries_change_no_other_answer(monkeypatch):
    """Nor do those of another copy, nor those of empty slots."""
    detector = drawn_detector(small())
    boxes = np.float32([[[[0.5, 0.5, 0.1, 0.1], [0.2, 0.3, 0.3, 0.3], [0.5] * 4]] * 2])
    queries = DenoisingQueries(boxes, np.bool_([[[1, 1, 0], [1, 0, 0]]]))
    monkeypatch.setattr(Denoising, "queries", lambda self, targets, key: targets)
    predictions = answer_of(detector, *example(), targets=queries)
    for ours, alone in zip(predictions[:2], answer_of(detector, *example())[:2], strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)
    boxes = boxes.copy()
    boxes[0, 1], boxes[0, 0, 2] = 0.3, 0.9
    moved = answer_of(detector, *example(), targets=queries._replace(boxes=boxes))
    assert predictions.denoising.boxes.shape == (2, 1, 6, 4)
    change = np.abs(moved.denoising.logits - predictions.denoising.logits).max(axis=(0, 1, 3))
    assert change[:2].max() < 1e-5 and change[2:].min() > 1e-2


def test_targets_become_denoising_queries_where_there_is_somewhere_to_start():
    targets = Targets(np.full((1, 3, 4), 0.5, np.float32), np.zeros((1, 3), np.int32), np.ones((1, 3), bool))

    def shapes(**changes):
        def call(image, valid, targets):
            return drawn_detector(small(**changes))(image, valid, targets=targets, dropout_key=jax.random.key(0))

        return jax.eval_shape(call, *example(), targets)

    assert shapes().denoising.logits.shape == (2, 1, 6, 5)
    assert shapes(denoising__copies=0).denoising is None
    with pytest.raises(UserError, match="denoising.copies needs config.model.start=proposals"):
        shapes(start="learned")


@pytest.mark.parametrize("twice", [False, True])
def test_which_deltas_learn_from_the_last_boxes(twice):
    """The deltas of their own layer, and with `look_forward_twice` those of the layer before."""
    detector = drawn_detector(small(decoder__num_layers=3, decoder__look_forward_twice=twice))
    graphdef, deltas, rest = nnx.split(detector, lambda path, _: path[0] == "decoder" and "box_head" in path, ...)

    def last_boxes(deltas):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, deltas, rest)(*example()).boxes[-1]))

    gradient = jax.jit(jax.grad(last_boxes))(deltas).decoder.layers.layers.heads.box_head.mlp.layers[2].bias[...]
    assert [layer.any() for layer in np.asarray(gradient)] == [False, twice, True]


def test_looking_forward_twice_changes_no_answer():
    once, twice = (drawn_detector(small(decoder__look_forward_twice=twice)) for twice in (False, True))
    for found, expected in zip(*(answer_of(d, *example())[:2] for d in (once, twice)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_places_are_shares_of_the_pixels():
    extents = extents_seen(small(), *example(size=(50, 70)))
    np.testing.assert_allclose(extents, [[[70 / 16, 50 / 16], [70 / 32, 50 / 32]]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": "random"}, "config.model.start is 'random'; it can be learned or proposals."),
        ({"box_deltas": "boxes"}, "config.model.box_deltas is 'boxes'; it can be scaled or logits."),
        ({"denoising__noise": -1.0}, "config.model.denoising.noise is -1.0; it must be at least 0."),
        ({"neck_blocks": -1}, "config.model.neck_blocks is -1; it must be at least 0."),
        ({"decoder__num_layers": 0}, "config.model.decoder.num_layers is 0; it must be at least 1."),
        ({"decoder__num_heads": 5}, "num_heads is 5; it must divide"),
    ],
)
def test_bad_fields(changes, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        abstract_detector(small(**changes))


@pytest.mark.parametrize("variant", ["r50_16", "r50_8", "r50_multiscale", "r101_multiscale", "x101_multiscale"])
def test_variants_build(variant):
    config = deperceiver_plus.get_config(variant)
    detector = abstract_detector(config)
    assert len(detector.level_embedding.get_value()) == len(config.model.strides)
    epochs = [deperceiver_plus.get_config(f"{variant}{tail}").train.num_epochs for tail in ("", "_12ep", "_24ep")]
    assert epochs == [50, 12, 24]

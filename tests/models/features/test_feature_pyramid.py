"""Maps of the backbone, added up and convolved."""

import jax
import numpy as np
from flax import nnx

from deperceiver_jax.models.features.feature_pyramid import FeaturePyramid, enlarge, sources
from tests.drawn_arrays import FLOAT32, answer_of


def test_a_pyramid_carries_deep_features_into_fine_maps():
    channels = {4: 3, 8: 3, 16: 3, 32: 3}
    features = {s: np.zeros((1, *size, 3), np.float32) for s, size in {8: (5, 7), 16: (3, 4), 32: (2, 2)}.items()}
    deep = features[32].copy()
    deep[0, 1, 1] = 9.0
    valid, new = np.ones((1, 40, 56), bool), dict(compute=FLOAT32, rngs=nnx.Rngs(0))
    for top_down in (False, True):
        levels = FeaturePyramid(channels, 4, strides=(8,), top_down=top_down, neck_blocks=0, **new)
        still, _ = answer_of(levels, features, valid)
        moved, (map_valid,) = answer_of(levels, {**features, 32: deep}, valid)
        changed = np.abs(moved[0] - still[0]).max(axis=-1)[0] > 1e-4
        assert map_valid.shape == (1, 5, 7)
        # The deep cell covers rows and columns from 4 on; the convolution reaches one further.
        assert changed[3:, 3:].all() == top_down and not changed[:3].any() and not changed[:, :3].any()


def test_a_block_of_the_neck_sees_two_cells_further():
    """One convolution after the other, and neither sees what padding holds."""
    new = dict(compute=FLOAT32, rngs=nnx.Rngs(0))
    levels = FeaturePyramid({8: 3}, 4, strides=(8,), top_down=False, neck_blocks=1, **new)
    features = np.random.default_rng(0).standard_normal((3, 9, 9, 3)).astype(np.float32)
    features[1:] = features[0]
    features[1, 3, 4] += 9.0
    features[2, 6, 4] += 9.0
    valid = np.ones((3, 72, 72), bool)
    valid[:, 48:] = False
    (of_level,), _ = answer_of(levels, {8: features}, valid)
    still, moved, hidden = of_level[:, :6]
    rows, columns = np.nonzero(np.abs(moved - still).max(axis=-1) > 1e-5)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 5, 2, 6)
    np.testing.assert_array_equal(hidden, still)


def test_enlarging_repeats_cells():
    x = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
    enlarged = jax.jit(enlarge, static_argnums=(1, 2))(x, 3, 4)
    np.testing.assert_array_equal(np.asarray(enlarged)[0, ..., 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])


def test_a_pyramid_needs_the_deeper_strides():
    assert sources((8,), top_down=True) == (8, 16, 32)
    assert sources((4, 16), top_down=False) == (4, 16)

"""Maps of the backbone, added up and convolved."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deperceiver_jax.models.features.feature_pyramid import FeaturePyramid, enlarge, sources
from tests.drawn_arrays import FLOAT32


def test_a_pyramid_carries_deep_features_into_fine_maps():
    channels = {4: 3, 8: 3, 16: 3, 32: 3}
    features = {8: jnp.zeros((1, 5, 7, 3)), 16: jnp.zeros((1, 3, 4, 3)), 32: jnp.zeros((1, 2, 2, 3))}
    valid, new = jnp.ones((1, 40, 56), bool), dict(compute=FLOAT32, rngs=nnx.Rngs(0))
    for top_down in (False, True):
        levels = FeaturePyramid(channels, 4, strides=(8,), top_down=top_down, neck_blocks=0, **new)
        still, _ = levels(features, valid)
        moved, (map_valid,) = levels({**features, 32: features[32].at[0, 1, 1].set(9.0)}, valid)
        changed = np.abs(moved[0] - still[0]).max(axis=-1)[0] > 1e-4
        assert map_valid.shape == (1, 5, 7)
        # The deep cell covers rows and columns from 4 on; the convolution reaches one further.
        assert changed[3:, 3:].all() == top_down and not changed[:3].any() and not changed[:, :3].any()


def test_a_block_of_the_neck_sees_two_cells_further():
    """One convolution after the other, and neither sees what padding holds."""
    new = dict(compute=FLOAT32, rngs=nnx.Rngs(0))
    levels = FeaturePyramid({8: 3}, 4, strides=(8,), top_down=False, neck_blocks=1, **new)
    features = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 9, 3)), jnp.float32)
    valid = np.ones((1, 72, 72))
    valid[:, 48:] = 0

    def real_cells(features):
        return levels({8: features}, jnp.asarray(valid, bool))[0][0][0, :6]

    still = real_cells(features)
    moved, hidden = (real_cells(features.at[0, row, 4].add(9.0)) for row in (3, 7))
    rows, columns = np.nonzero(np.abs(moved - still).max(axis=-1) > 1e-5)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 5, 2, 6)
    np.testing.assert_array_equal(hidden, still)


def test_enlarging_repeats_cells():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(enlarge(x, 3, 4)[0, ..., 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])


def test_a_pyramid_needs_the_deeper_strides():
    assert sources((8,), top_down=True) == (8, 16, 32)
    assert sources((4, 16), top_down=False) == (4, 16)

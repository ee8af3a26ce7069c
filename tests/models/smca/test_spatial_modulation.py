"""Gaussians of SMCA against numbers worked out by hand; what each field changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.kernels.log_gaussian import bias_map
from deperceiver_jax.models.smca import spatial_modulation
from deperceiver_jax.models.smca.spatial_modulation import ModulationFields, SpatialModulation
from tests.drawn_arrays import level_tokens

RELEASED = dict(
    num_layers=1,
    num_heads=2,
    mlp_dim=8,
    center_layers=1,
    modulation="multi_head",
    gaussian_scale="independent",
    scale_form="inverse",
    beta=8.0,
    stride_factor=True,
    scale_selection=True,
)
CELL_3_1 = 4 * 1 + 3  # x = 3, y = 1 on a map of three rows and four columns


@pytest.fixture(autouse=True, params=["maps", "what kernels and blocks compute"])
def bias_of_heads(request, monkeypatch):
    monkeypatch.setattr(spatial_modulation, "LARGE", 2**20 if request.param == "maps" else 0)


def log_gaussian(*, center=(1.0, 1.0), offset=None, scale=None, strides=(32,), **changes):
    """[H, cells] of one query; `offset` and `scale` are the predictions, the same for any query."""
    fields = ModulationFields(**{**RELEASED, **changes})
    modulation = SpatialModulation(8, fields, strides=strides, rngs=nnx.Rngs(0))
    for layer, values in ((modulation.offset, offset or 0.0), (modulation.scale, scale)):
        if layer is not None:
            layer.kernel.set_value(np.zeros(layer.kernel.shape, np.float32))
            if values is not None:
                layer.bias.set_value(np.broadcast_to(np.float32(values).reshape(-1), layer.bias.shape))
    query = np.random.default_rng(0).standard_normal((1, 1, 8), np.float32)
    center = np.float32(center)[None, None] * strides[0]

    @nnx.jit
    def map_and_weight(modulation):
        bias, weight = modulation(query, center, level_tokens([np.ones((1, 3, 4), bool)] * len(strides)))
        return bias_map(bias)[0, :, 0], weight

    bias, weight = jax.device_get(map_and_weight(modulation))
    if weight is not None:
        np.testing.assert_allclose(weight.sum(axis=-1), 1, rtol=1e-6)
    return bias


def test_released_form_by_hand():
    """Centre at the cell (1, 1), scales as they start: two columns away is -2^2 / 8."""
    bias = log_gaussian()
    assert bias.shape == (2, 12)
    np.testing.assert_allclose(bias[:, CELL_3_1], -0.5, rtol=1e-6)
    np.testing.assert_allclose(bias[:, 4 + 1], 0.0, atol=1e-6)
    np.testing.assert_allclose(bias[0, [0, 11]], [-0.25, -(4 + 1) / 8], rtol=1e-6)


def test_heads_have_offsets_and_scales():
    """Head 0 looks half a column to the right and narrowly in x, head 1 one row up and narrowly in y."""
    bias = log_gaussian(offset=[0.5, 0, 0, -1], scale=[2, 1, 1, -3])
    np.testing.assert_allclose(bias[:, CELL_3_1], [-4 * 1.5**2 / 8, -(4 + 9) / 8], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(gaussian_scale="fixed", scale=None), -(4 + 1) / 8),
        (dict(gaussian_scale="single", scale=2.0), -4 * (4 + 1) / 8),
        (dict(gaussian_scale="independent", scale=[2, 3] * 2), -(4 * 4 + 9 * 1) / 8),
        (dict(gaussian_scale="coupled", scale=[2, 3, 5] * 2), -(4 * 4 + 9 * 1 + 25 * 4) / 8),
        (dict(scale_form="width", scale=[2, 3] * 2), -(4 / 4 + 1 / 9) / 8),
        (dict(beta=2.0), -(4 + 1) / 2),
        (dict(strides=(16,)), -(4 + 1) / 16),
        (dict(strides=(16,), stride_factor=False), -(4 + 1) / 8),
        (dict(modulation="head_shared", scale=[2, 3]), -(4 * 4 + 9 * 1) / 8),
    ],
)
def test_every_form_by_hand(changes, expected):
    """From the centre (1, 0), the cell (3, 1)."""
    bias = log_gaussian(center=(1.0, 0.0), **changes)
    assert len(bias) == (1 if changes.get("modulation") == "head_shared" else 2)
    np.testing.assert_allclose(bias[:, CELL_3_1], expected, rtol=1e-4)


def test_levels_have_their_own_cells():
    """(64, 32) in pixels is the cell (4, 2) at stride 16 and (1, 0.5) at 64; precision grows with the stride."""
    bias = log_gaussian(center=(4.0, 2.0), strides=(16, 64))
    np.testing.assert_allclose(bias[0, [CELL_3_1, 12 + CELL_3_1]], [-(1 + 1) / 16, -2 * (4 + 0.25) / 8], rtol=1e-6)


@pytest.mark.parametrize("modulation, select", [("none", True), ("none", False), ("multi_head", False)])
def test_parts_that_are_off(modulation, select):
    fields = ModulationFields(**{**RELEASED, "modulation": modulation, "scale_selection": select})
    spatial = SpatialModulation(8, fields, strides=(16, 32), rngs=nnx.Rngs(0))
    image = level_tokens([np.ones((1, 3, 4), bool), np.ones((1, 1, 2), bool)])

    def map_and_weight(spatial, *arguments):
        bias, weight = spatial(*arguments)
        return None if bias is None else bias_map(bias), weight

    bias, weight = nnx.eval_shape(map_and_weight, spatial, jnp.ones((1, 3, 8)), jnp.ones((1, 3, 2)), image)
    assert (bias is None) == (modulation == "none")
    assert bias is None or bias.shape == (1, 2, 3, 14)
    assert (weight is None) == (not select)
    assert weight is None or weight.shape == (1, 3, 2)

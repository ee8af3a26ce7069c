"""Deformable convolution against torchvision's operator, whose answers are in golden/backbone.npz."""

from pathlib import Path

import jax
import numpy as np
import pytest

from deperceiver_jax.models.layers import level_sampling
from deperceiver_jax.models.layers.convolution import convolution
from deperceiver_jax.models.layers.deformable_convolution import deformable_convolution
from deperceiver_jax.models.layers.level_sampling import PORTABLE

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "backbone.npz")
KERNEL, IMAGE = (2, 3, 1, 0), (0, 2, 3, 1)  # axes of theirs in our order


def golden(case: str) -> dict[str, np.ndarray]:
    """{name: array} in our layouts: offsets (x, y), where torchvision has (y, x)."""
    arrays = {name.removeprefix(f"{case}/"): GOLDEN[name] for name in GOLDEN if name.startswith(f"{case}/")}
    for name, array in arrays.items():
        arrays[name] = array.transpose(KERNEL if name.endswith("kernel") else IMAGE)
    for name in ("offset", "of_offset"):
        arrays[name] = arrays[name].reshape(*arrays[name].shape[:3], 9, 2)[..., ::-1]
    return arrays


@pytest.mark.parametrize("sampling", ["gather", PORTABLE])
@pytest.mark.parametrize(
    "case, stride, dilation",
    [
        ("deformable", 1, 1),
        ("deformable_stride", 2, 1),  # and two groups
        ("deformable_dilation", 1, 2),  # and two groups
        ("deformable_start", 2, 1),  # no offsets: places are cells, where the slope is that of the right and below
    ],
)
def test_values_and_gradients_are_torchvisions(case, stride, dilation, sampling, monkeypatch):
    monkeypatch.setattr(level_sampling, "GATHER_FLOATS", 100 * 16)  # several blocks, the last of which is filled up
    arrays = golden(case)
    inputs = [np.float32(arrays[name]) for name in ("x", "kernel", "offset", "mask")]

    @jax.jit
    def value_and_gradients(*inputs):
        how = (stride, dilation)
        y, backward = jax.vjp(lambda *a: deformable_convolution(*a, *how, sampling=sampling), *inputs)
        return y, *backward(np.float32(arrays["cotangent"]))

    found = value_and_gradients(*inputs)
    for name, ours in zip(("y", "of_x", "of_kernel", "of_offset", "of_mask"), found, strict=True):
        np.testing.assert_allclose(ours, arrays[name], atol=3e-5, err_msg=name)


def test_without_offsets_it_is_a_convolution():
    arrays = {name: np.float32(array) for name, array in golden("deformable_start").items()}
    weight = np.ones_like(arrays["mask"])

    @jax.jit
    def both(x, kernel, offset):
        return deformable_convolution(x, kernel, offset, weight, 2, 1), convolution(x, kernel, 2, 1)

    np.testing.assert_allclose(*both(arrays["x"], arrays["kernel"], arrays["offset"]), atol=1e-5)

"""A step of every family on more devices than one, and on two processes; `python -m tests.devices` has every row."""

import jax
import pytest

from deperceiver_jax.sharding import make_mesh
from tests.devices import FAMILIES, MESHES, PAIR, difference, one_step, steps_of_two_processes

pytestmark = pytest.mark.slow

ROWS = {  # every family, every number of devices, both matchers
    "deperceiver": ("8", "scipy"),
    "deperceiver_plus": ("2", "device"),
    "detr": (PAIR, "scipy"),
    "deformable_detr": ("4", "device"),
    "smca": ("4 x 2", "scipy"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_devices_do_as_one(name):
    devices, backend = ROWS[name]
    if devices == PAIR:
        (step,) = steps_of_two_processes([(name, backend)]).values()
    else:
        count, model = MESHES[devices]
        step = one_step(name, backend, make_mesh(model, devices=jax.devices()[:count]))
        assert step.held == 1.0 if model == 1 else step.held < 0.75
    found = difference(name, step)
    assert found.passes, found

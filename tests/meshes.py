"""Meshes of devices that are not here."""

from types import SimpleNamespace

import jax
import numpy as np

from deperceiver_jax.sharding import make_mesh


def mesh_on(platform: str, version: str = "") -> SimpleNamespace:
    """One device, as much of it as `traced_for` looks at; version: of the platform, as jax.Client has it."""
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    one = make_mesh(devices=jax.devices()[:1])
    return SimpleNamespace(devices=np.array([[device]]), abstract_mesh=one.abstract_mesh)

"""Operations that are written in another form for each platform, and the platform that a program is traced for.

Where it is not known, as in a function that somebody jits, all forms are traced, and the compiler takes the one of its
own platform. That is slower to trace, the more so as rows of layers and the operations inside of them both have forms.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

# JAX keeps what it has traced for one value from being used for another.
_target = jax.make_user_context(None)


@contextlib.contextmanager
def traced_for(mesh: Mesh) -> Iterator[None]:
    """What is traced inside, or in the function that this decorates, runs on the devices of `mesh`.

    So kernels are called with each device's images; see kernels/each_device.py.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    with _target(platform), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def target_platform() -> str | None:
    """cpu, tpu, cuda or rocm; None where it is not known."""
    return _target.value


def by_platform(*operands, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """One of `forms`, which have the names of platforms, of the operands; `default` on all other platforms."""
    platform = target_platform()
    if platform is None:
        return jax.lax.platform_dependent(*operands, default=default, **forms)
    return forms.get(platform, default)(*operands)

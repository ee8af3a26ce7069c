"""Forms for platforms: all are traced where the platform is not known, and one where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deperceiver_jax.models.layers.by_platform import by_platform, target_platform, traced_for
from deperceiver_jax.sharding import make_mesh
from tests.meshes import mesh_on


def chosen(x):
    return by_platform(x, cpu=jnp.sin, tpu=jnp.cos, cuda=jnp.tan, default=jnp.exp)


@jax.custom_vjp
def with_gradient(x):
    return chosen(x)


with_gradient.defvjp(lambda x: (chosen(x), x), lambda x, gradient: (gradient * chosen(x),))


@pytest.mark.parametrize(
    ("mesh", "name", "operation"),
    [
        (mesh_on("cpu"), "cpu", "sin"),
        (mesh_on("tpu"), "tpu", "cos"),
        (mesh_on("gpu", "PJRT C API\ncuda 12090"), "cuda", "tan"),
        (mesh_on("gpu", "PJRT C API\nrocm 60300"), "rocm", "exp"),
    ],
)
def test_a_known_platform_has_its_own_form_alone(mesh, name, operation):
    def forward(x):
        assert target_platform() == name
        return with_gradient(x)

    def step(x):
        with traced_for(mesh):
            return jax.value_and_grad(forward)(x)

    program = str(jax.make_jaxpr(step)(1.0))
    assert [f" {each} " in program for each in ("sin", "cos", "tan", "exp")].count(True) == 1
    assert f" {operation} " in program and "platform_index" not in program
    assert target_platform() is None


def test_an_unknown_platform_is_the_compiler_s():
    program = str(jax.make_jaxpr(chosen)(1.0))
    assert all(f" {each} " in program for each in ("sin", "cos", "tan", "exp"))
    assert jax.jit(chosen)(1.0) == pytest.approx(np.sin(1.0), rel=1e-6)


def test_what_was_traced_for_one_platform_is_not_used_for_another():
    """A function that has its own jit, or is run by a loop, is traced once for each."""

    @jax.jit
    def inner(x):
        return jax.lax.scan(lambda x, _: (chosen(x), None), x, length=2)[0]

    def program(platform):
        with traced_for(mesh_on(platform)):
            return str(jax.make_jaxpr(inner)(1.0))

    for _ in range(2):
        assert " sin " in program("cpu") and " cos " not in program("cpu")
        assert " cos " in program("tpu") and " sin " not in program("tpu")


def test_as_a_decorator_it_knows_the_mesh_as_well():
    mesh = make_mesh(devices=jax.devices()[:4])

    @traced_for(mesh)
    def devices():
        return jax.sharding.get_abstract_mesh().size, target_platform()

    assert devices() == devices() == (4, "cpu")
    assert jax.sharding.get_abstract_mesh().empty

"""Meshes and batches on eight simulated devices."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from deperceiver_jax.errors import UserError
from deperceiver_jax.sharding import (
    batch_sharding,
    check_batch_size,
    count_slices,
    gather,
    make_mesh,
    replicated,
    shard_batch,
    state_sharding,
)
from deperceiver_jax.structures import Batch


def make_batch(num_images):
    rng = np.random.default_rng(0)
    return Batch(
        image=rng.integers(0, 256, (num_images, 4, 6, 3), dtype=np.uint8),
        size=np.full((num_images, 2), 4, np.int32),
        original_size=np.full((num_images, 2), 40, np.int32),
        example=np.arange(num_images, dtype=np.int32),
        boxes=rng.uniform(size=(num_images, 5, 4)).astype(np.float32),
        labels=rng.integers(0, 9, (num_images, 5), dtype=np.int32),
        box_valid=np.ones((num_images, 5), bool),
    )


@pytest.mark.parametrize(("model", "shape"), [(1, (8, 1)), (2, (4, 2)), (8, (1, 8))])
def test_mesh_axes(model, shape):
    mesh = make_mesh(model)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_chosen_devices():
    assert list(make_mesh(devices=jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize("model", [0, 3, 16])
def test_model_axis_must_divide_the_devices(model):
    with pytest.raises(UserError, match=f"config.mesh.model is {model}, .* 8 devices"):
        make_mesh(model)


@dataclasses.dataclass(frozen=True, order=True)
class Chip:
    """What JAX knows of a chip of TPU v5e."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices, side=4):
    """Of so many slices of side x side, each host with 2 x 2 of them, in an order that tells nothing."""
    places = [(k, x, y) for k in range(slices) for y in range(side) for x in range(side)]
    hosts = side // 2
    found = [Chip(1000 * k + side * y + x, k, (x, y, 0), k * hosts**2 + y // 2 * hosts + x // 2) for k, x, y in places]
    return found[::-1]


@pytest.mark.parametrize("model", [1, 2, 4, 16])
def test_neighbours_along_model_are_of_one_slice(model, monkeypatch):
    monkeypatch.setattr("deperceiver_jax.sharding.Mesh", lambda placed, names, axis_types: (placed, names))
    devices = chips(slices=4)
    placed, names = make_mesh(model, devices)
    assert names == ("data", "model") and placed.shape == (64 // model, model)
    assert sorted(placed.flat) == sorted(devices)
    slices = np.vectorize(lambda chip: chip.slice_index)(placed)
    assert (slices == slices[:, :1]).all()
    assert (slices[:, 0].reshape(4, -1) == np.arange(4)[:, None]).all()  # and along data one slice after the other


def test_chips_that_know_no_slice_are_of_one():
    """Those of a topology of one slice, as libtpu 0.0.51 describes it."""
    nameless = [SimpleNamespace(platform="tpu", id=chip.id) for chip in chips(slices=1)]
    assert (count_slices(nameless), count_slices(chips(slices=1)), count_slices(chips(slices=4))) == (1, 1, 4)


def test_the_model_axis_must_divide_a_slice():
    with pytest.raises(UserError, match="is 32, which does not divide the 16 devices of each of the 2 slices."):
        make_mesh(32, chips(slices=2))


@pytest.mark.parametrize("model", [1, 2])
def test_batch_is_split_over_all_devices_and_unchanged(model):
    mesh, batch = make_mesh(model), make_batch(16)
    on_devices = shard_batch(batch, mesh)
    assert isinstance(on_devices, Batch)
    for host, device in zip(batch, on_devices, strict=True):
        assert device.sharding.is_equivalent_to(batch_sharding(mesh), device.ndim)
        assert device.dtype == host.dtype
        assert device.addressable_shards[0].data.shape[0] == 2
        np.testing.assert_array_equal(device, host)


def test_batch_that_does_not_divide_is_a_sentence():
    with pytest.raises(UserError, match="global batch size is 12, .* 8 devices; take a multiple of 8"):
        shard_batch(make_batch(12), make_mesh())
    with pytest.raises(UserError, match="^config.data.batch_size is 12, "):
        check_batch_size(12, make_mesh(2), field="config.data.batch_size")
    check_batch_size(16, make_mesh(2), field="config.data.batch_size")


def test_arrays_of_a_batch_have_equally_many_images():
    with pytest.raises(ValueError, match="equally many images"):
        shard_batch({"a": np.zeros((8, 2)), "b": np.zeros((16,))}, make_mesh())


def test_state_is_whole_on_every_device_unless_the_model_axis_splits_it():
    mesh = make_mesh()
    abstract = jax.eval_shape(lambda: {"kernel": jnp.zeros((64, 128)), "step": jnp.int32(0)})
    shardings = state_sharding(abstract, mesh)
    assert shardings == {"kernel": replicated(mesh), "step": replicated(mesh)}
    assert replicated(mesh).spec == PartitionSpec()
    state = jax.jit(lambda: {"kernel": jnp.ones((64, 128)), "step": jnp.int32(0)}, out_shardings=shardings)()
    assert {shard.data.shape for shard in state["kernel"].addressable_shards} == {(64, 128)}


def test_the_model_axis_splits_the_longest_axis_that_divides():
    mesh = make_mesh(4)
    shapes = {"tall": (128, 64), "stack": (6, 64, 64), "odd": (66, 124), "prime": (67, 67), "small": (8, 511)}
    specs = {name: s.spec for name, s in state_sharding({n: jnp.zeros(x) for n, x in shapes.items()}, mesh).items()}
    assert specs == {
        "tall": PartitionSpec("model"),
        "stack": PartitionSpec(None, "model"),
        "odd": PartitionSpec(None, "model"),
        "prime": PartitionSpec(),
        "small": PartitionSpec(),
    }
    tall = jax.device_put(jnp.zeros((128, 64)), state_sharding(jnp.zeros((128, 64)), mesh))
    assert {shard.data.shape for shard in tall.addressable_shards} == {(32, 64)}


def test_a_gathered_array_has_a_gradient_that_is_split_again():
    mesh = make_mesh(4)
    kernel = jnp.arange(128 * 64, dtype=jnp.float32).reshape(128, 64)
    split = jax.device_put(kernel, state_sharding(kernel, mesh))
    square = jax.jit(jax.grad(lambda x: jnp.square(gather(x, mesh)).sum()), out_shardings=split.sharding)
    np.testing.assert_array_equal(square(split), 2 * kernel)
    assert "all-gather" in square.lower(split).compile().as_text()


def test_a_sum_over_images_is_a_sum_over_all_devices():
    batch = make_batch(8)
    total = jax.jit(lambda batch: jnp.sum(batch.example))(shard_batch(batch, make_mesh()))
    assert total == 28

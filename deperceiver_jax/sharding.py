"""Where arrays live: one mesh with axes `data` and `model`.

Images are split over all devices. What a run keeps between steps (parameters, optimiser state, averages) is whole along
`data` and split along `model`, so that with `model` devices along that axis each holds one part in `model`; a step
gathers the parameters before it computes with them (ZeRO; FSDP in PyTorch), so no number depends on the mesh's shape.
Of several TPU slices, each has all of `model`: parameters are gathered over a slice's own links, and only sums, of
gradients above all, go from slice to slice over the data centre's network.

One process or many, one device or a pod: the same calls. Sharding is left to the compiler (`AxisType.Auto`): the step
is written for the global batch, and a sum over images is a sum over all devices.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from deperceiver_jax.errors import UserError

ALL_DEVICES = ("data", "model")  # along which images are split
SMALLEST_SPLIT = 4096  # numbers; less is not worth a collective of its own


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts (or `devices`): `model` of them along that axis, the others along `data`.

    Devices that are neighbours along `model` are of one slice. Raises UserError where `model` does not divide a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = count_slices(devices)
    count = len(devices) // slices
    if model < 1 or count % model:
        of = f"each of the {slices} slices" if slices > 1 else "this run"
        raise UserError(f"config.mesh.model is {model}, which does not divide the {count} devices of {of}.")
    shape, axes = (count // model, model), (AxisType.Auto, AxisType.Auto)
    if slices == 1:
        return jax.make_mesh(shape, ("data", "model"), axis_types=axes, devices=devices)
    placed = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1), devices, allow_split_physical_axes=True)
    return Mesh(placed, ("data", "model"), axis_types=axes)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices they are of; elsewhere 1. JAX calls the machines of a cluster of GPUs slices, too.

    A chip of a topology of one slice, which is not there, has no number of its slice.
    """
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images split over all devices, along the leading axis of every array of a `Batch`."""
    return NamedSharding(mesh, PartitionSpec(ALL_DEVICES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(abstract_state, mesh: Mesh):
    """A sharding for each array of a state (real, or `jax.eval_shape` of it), in the same tree.

    An array is split along its longest axis that divides over `model`; small ones, and those without such an axis, are
    replicated. It depends on the shape alone, so a parameter, its moments and its average lie alike.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _split_spec(x.shape, mesh.shape["model"])), abstract_state)


def _split_spec(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    lengths = {axis: length for axis, length in enumerate(shape) if length % parts == 0}
    if parts == 1 or not lengths or np.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec()
    longest = max(lengths, key=lengths.__getitem__)
    return PartitionSpec(*[None] * longest, "model")


def gather(arrays, mesh: Mesh):
    """Inside a jitted function: a tree of arrays, each whole on every device. Its gradient is split like the input."""
    return jax.lax.with_sharding_constraint(arrays, replicated(mesh))


def place(array, sharding: Sharding) -> jax.Array:
    """An array that every host has whole (NumPy's or JAX's) -> one on the devices of `sharding`."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_batch_size(batch_size: int, mesh: Mesh, *, field: str) -> None:
    """Raises UserError unless a global batch of this size divides over the devices. `field` is what a person set."""
    shards = mesh.size
    if batch_size % shards:
        raise UserError(
            f"{field} is {batch_size}, which does not divide over {shards} devices; take a multiple of {shards}."
        )


def whole_batch(count: int, mesh: Mesh) -> int:
    """The next number of images that divides over the devices, where how many there are changes no number."""
    return -(-count // mesh.size) * mesh.size


def shard_batch(batch, mesh: Mesh):
    """This host's slice of a batch (any tree of NumPy arrays with images leading) -> global arrays on the devices.

    Each host passes equally many images, in the order of its own rows of the global batch.
    """
    num_images = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if len(num_images) != 1:
        raise ValueError(f"The arrays of a batch must have equally many images, not {sorted(num_images)}.")
    check_batch_size(num_images.pop() * jax.process_count(), mesh, field="The global batch size")
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)

"""Where arrays live: one mesh with axes `data` (images are split) and `model` (parameters may be split).

One process or many, one device or a pod: the same calls. Sharding is left to the compiler (`AxisType.Auto`): the step
is written for the global batch, and a sum over images is a sum over all devices.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deperceiver_jax.errors import UserError


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts (or `devices`): `model` of them along that axis, the others along `data`."""
    devices = list(jax.devices() if devices is None else devices)
    if model < 1 or len(devices) % model:
        raise UserError(f"config.mesh.model is {model}, which does not divide the {len(devices)} devices of this run.")
    shape = (len(devices) // model, model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images split along `data`, the leading axis of every array of a `Batch`; the same along `model`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(abstract_state, mesh: Mesh):
    """A sharding for each array of a state (real, or `jax.eval_shape` of it), in the same tree: all replicated."""
    return jax.tree.map(lambda _: replicated(mesh), abstract_state)


def check_batch_size(batch_size: int, mesh: Mesh, *, field: str) -> None:
    """Raises UserError unless a global batch of this size divides over the devices. `field` is what a person set."""
    shards = mesh.shape["data"]
    if batch_size % shards:
        raise UserError(
            f"{field} is {batch_size}, which does not divide over {shards} devices; take a multiple of {shards}."
        )


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

"""Kernels on several devices."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


def on_each_device(function: Callable) -> Callable:
    """`function` of each device's own images: a kernel cannot be split by the compiler.

    The devices are those of the mesh in whose context the detector is called, or the one that there is. Arrays have the
    images along their first axis, the first array of all; of the others one of length 1 is the same for all images.
    """

    def apply(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        images = PartitionSpec(mesh.axis_names)
        others = jax.tree.map(lambda x: PartitionSpec() if x.shape[0] == 1 else images, arrays[1:])
        given = (images, *others)
        return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=images, check_vma=False)(*arrays)

    return apply

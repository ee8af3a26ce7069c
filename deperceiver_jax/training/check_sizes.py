"""Whether a detector takes images of every size that will come, asked before the first step."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.layers.by_platform import traced_for


def check_sizes(
    merge: Callable[[Mapping[str, Array]], nnx.Module],
    arrays: Mapping[str, Array | jax.ShapeDtypeStruct],
    sizes: Iterable[tuple[int, int]],
    mesh: Mesh,
) -> None:
    """Raises what the detector says against one of `sizes`, (height, width) of padded images, naming the size.

    merge: arrays by path -> the detector that computes with them. Nothing is computed, only traced, and only for the
    smallest and the largest sizes: a map that is too small, or too large, is so at one end.
    """

    @traced_for(mesh)
    def forward(arrays, image, pixel_valid):
        return merge(arrays)(image, pixel_valid)

    for height, width in extreme_sizes(sizes):
        image = jax.ShapeDtypeStruct((mesh.size, height, width, 3), jnp.float32)
        pixel_valid = jax.ShapeDtypeStruct(image.shape[:3], bool)
        try:
            jax.eval_shape(forward, dict(arrays), image, pixel_valid)
        except UserError as error:
            raise UserError(f"Images of {height} x {width} pixels, padding included, will come, but: {error}") from None


def extreme_sizes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that have no other one inside of them, or that lie in no other one."""
    unique = sorted({(int(height), int(width)) for height, width in sizes})

    def inside(a, b):
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    return [a for a in unique if not any(inside(b, a) for b in unique) or not any(inside(a, b) for b in unique)]

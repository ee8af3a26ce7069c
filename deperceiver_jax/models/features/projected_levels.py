"""Backbone features at several strides -> maps of one width, the levels that become tokens."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.convolution import PaddedConvolution
from deperceiver_jax.models.layers.initializers import ones, zeros
from deperceiver_jax.models.layers.linear import linear, torch_start, xavier_start


class ProjectedLevels(nnx.Module):
    """One map of each stride, by a 1x1 convolution, then `extra_levels` of half the size each, by 3x3 convolutions.

    The first extra level is made from the backbone's last features, each further one from the level before it. With
    `group_norm`, as in Deformable DETR, 32 groups norm each map, kernels start Xavier-uniform and biases at zero.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int,
        *,
        extra_levels: int = 0,
        group_norm: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_at_least("config.model.extra_levels", extra_levels, 0)
        if group_norm and dim % 32:
            raise UserError(f"config.model.embed_dim is {dim}; its 32 norm groups must be of equal width.")

        start, dtype = (xavier_start if group_norm else torch_start), compute.dtype

        def halving(width):
            return PaddedConvolution(width, dim, 3, stride=2, **start(9 * width, 9 * dim), compute=compute, rngs=rngs)

        self.num_strides = len(channels)
        self.projections = nnx.List([linear(c, dim, **start(c, dim), dtype=dtype, rngs=rngs) for c in channels])
        for width in [channels[-1], *[dim] * extra_levels][:extra_levels]:
            self.projections.append(halving(width))
        norm: dict = dict(num_groups=32, epsilon=1e-5, use_fast_variance=False, scale_init=ones, bias_init=zeros)
        self.norms = nnx.List(
            [nnx.GroupNorm(dim, **norm, dtype=dtype, rngs=rngs) for _ in self.projections if group_norm]
        )

    def __call__(self, features: Sequence[Float[Array, "B h w C"]]) -> list[Float[Array, "B h w D"]]:
        """As in the published models, norms count padding too. Refuses a level below a map of a single cell."""
        maps: list[Array] = []
        for level, projection in enumerate(self.projections):
            if level < self.num_strides:
                source = features[level]
            else:
                source = features[-1] if level == self.num_strides else maps[-1]
                if source.shape[1] == source.shape[2] == 1:
                    raise UserError(
                        f"config.model.extra_levels: level {level} of an image of this size would halve a map of a "
                        "single cell; give larger images or fewer levels."
                    )
            x = projection(source)
            maps.append(self.norms[level](x) if self.norms else x)
        return maps

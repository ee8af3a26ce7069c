"""ResNet and ResNeXt, the convolutional backbones of every detector here: an image in, features keyed by stride out.

Source: arXiv:1512.03385 in torchvision's "v1.5" form (the stride of a bottleneck lies on its 3x3 convolution), and
arXiv:1611.05431 for groups. Published weights of torchvision and timm fit without change. All padding is symmetric, as
PyTorch's: XLA's SAME pads (2, 3) where (3, 3) is meant, and shifts every feature map by a pixel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deperceiver_jax.errors import UserError, check_at_least, check_choice
from deperceiver_jax.models.layers.activations import masked_relu, relu
from deperceiver_jax.models.layers.compute import EXACT, Compute
from deperceiver_jax.models.layers.convolution import convolution, plain_convolution
from deperceiver_jax.models.layers.deformable_convolution import deformable_convolution
from deperceiver_jax.models.layers.initializers import scaled_normal, zeros
from deperceiver_jax.models.layers.layer_stack import LayerStack, apply_rematerialized
from deperceiver_jax.models.layers.level_sampling import PORTABLE
from deperceiver_jax.models.layers.max_pool import max_pool

# depth: (blocks of each stage, whether they are bottlenecks)
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
STRIDES = (4, 8, 16, 32)  # of the four stages

kaiming_normal_fan_out = scaled_normal(2.0)


class Frozen(nnx.Variable):
    """An array that is never trained: no gradient, no optimiser state, no weight decay. Not an `nnx.Param`."""


class Conv(nnx.Module):
    """A square convolution without bias; pads (size - 1) / 2 * dilation on every side.

    Kernel [size, size, in / groups, out]: each group of outputs sees its own inputs.
    """

    def __init__(self, in_dim, out_dim, size, *, stride=1, dilation=1, groups=1, frozen, compute: Compute, rngs):
        variable, shape = Frozen if frozen else nnx.Param, (size, size, in_dim // groups, out_dim)
        self.kernel = variable(kaiming_normal_fan_out(rngs.params(), shape, jnp.float32))
        self.stride = stride
        self.dilation = dilation
        self.dtype = compute.dtype
        self.portable = compute.portable

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        convolve = plain_convolution if self.portable else convolution
        return convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, self.dilation)


class DeformableConv(Conv):
    """A deformable convolution, whose offsets and weights are those that a convolution of the same reach answers.

    As in DCN v2 (arXiv:1811.11168, section 3.1) there are no offsets at first, and every tap counts half.
    """

    def __init__(self, in_dim, out_dim, size, *, stride, dilation, groups, frozen, compute: Compute, rngs):
        how = dict(stride=stride, dilation=dilation, groups=groups)
        super().__init__(in_dim, out_dim, size, **how, frozen=frozen, compute=compute, rngs=rngs)
        reach: dict = dict(strides=stride, padding=size // 2 * dilation, kernel_dilation=dilation)
        reach |= dict(kernel_init=zeros, bias_init=zeros, **EXACT)  # bfloat16 would be coarser than a cell
        self.offsets = nnx.Conv(in_dim, 3 * size**2, (size, size), **reach, rngs=rngs)
        self.sampling = PORTABLE if compute.portable else "gather"

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        answers = self.offsets(x)
        answers = answers.reshape(*answers.shape[:3], -1, 3)  # of each tap: x, y, the logit of its weight
        offset, weight = answers[..., :2], jax.nn.sigmoid(answers[..., 2])
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return deformable_convolution(x, kernel, offset, weight, self.stride, self.dilation, sampling=self.sampling)


class FrozenBatchNorm(nnx.Module):
    """Batch norm of pretrained networks, with its statistics, scale and bias fixed.

    Padding is not masked: as in the published models, an image's features depend a little on the padding around it.
    """

    def __init__(self, dim: int, *, dtype):
        self.scale = Frozen(np.ones(dim, np.float32))
        self.bias = Frozen(np.zeros(dim, np.float32))
        self.mean = Frozen(np.zeros(dim, np.float32))
        self.var = Frozen(np.ones(dim, np.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"], valid: Bool[Array, "B H W"] | None) -> Float[Array, "B H W C"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * scale
        return x * _channels(scale).astype(self.dtype) + _channels(shift).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group norm (arXiv:1803.08494) for training from scratch: 32 groups, fewer where they'd hold under two channels.

    Statistics are of the real pixels alone and padding stays zero, so features do not depend on the padding.
    """

    def __init__(self, dim: int, *, initial_scale: float = 1.0, dtype):
        self.scale = nnx.Param(np.full(dim, initial_scale, np.float32))
        self.bias = nnx.Param(np.zeros(dim, np.float32))
        self.num_groups = math.gcd(32, dim // 2)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"], valid: Bool[Array, "B H W"] | None) -> Float[Array, "B H W C"]:
        if valid is None:
            valid = jnp.ones(x.shape[:3], bool)
        weight = valid[..., None].astype(jnp.float32)
        count = jnp.maximum(jnp.sum(weight, axis=(1, 2)) * (x.shape[-1] // self.num_groups), 1.0)  # [B 1]

        def group_mean(x):
            """Of each channel's group. Only sums of channels take the shape of groups, whose few channels are slow."""
            sums = jnp.sum(x, axis=(1, 2)).reshape(x.shape[0], self.num_groups, -1).sum(axis=2)
            return jnp.repeat(sums / count, x.shape[-1] // self.num_groups, axis=1)[:, None, None]

        x = x.astype(jnp.float32) * weight
        centered = (x - group_mean(x)) * weight
        inverse = jax.lax.rsqrt(group_mean(centered**2) + 1e-5)
        y = centered * (inverse * _channels(self.scale[...])) + _channels(self.bias[...]) * weight
        return y.astype(self.dtype)


def _channels(vector):
    """[C] -> [1, 1, 1, C], to broadcast over an image."""
    return vector[None, None, None, :]


def _subsample(valid, stride):
    """The mask after a layer of this stride: cell i stands for pixel stride * i, so ceil(n / stride) stay valid."""
    if valid is None or stride == 1:
        return valid
    return jax.lax.slice(valid, (0, 0, 0), valid.shape, (1, stride, stride))


class Bottleneck(NamedTuple):
    """What distinguishes the 3x3 convolutions of bottlenecks: ResNeXt's groups and width, and DCN v2."""

    groups: int
    inner_ratio: int  # of their channels to those of a ResNet
    deformable: bool


class Block(nnx.Module):
    """Residual block: convolutions, each followed by its norm, beside a shortcut; ReLU between and at the end.

    Bottleneck: 1x1, 3x3 (stride, dilation), 1x1 to four times `dim` channels. Basic (None): 3x3 (stride), 3x3.
    """

    def __init__(
        self,
        in_dim,
        dim,
        *,
        bottleneck: Bottleneck | None,
        stride=1,
        dilation=1,
        make_norm,
        frozen,
        compute,
        rngs: nnx.Rngs,
    ):
        out_dim = 4 * dim if bottleneck else dim
        self.stride = stride
        self.bottleneck = bottleneck is not None

        def conv(in_dim, out_dim, size, make=Conv, **kwargs):
            return make(in_dim, out_dim, size, frozen=frozen, compute=compute, rngs=rngs, **kwargs)

        if bottleneck:
            inner, make = bottleneck.inner_ratio * dim, DeformableConv if bottleneck.deformable else Conv
            how = dict(stride=stride, dilation=dilation, groups=bottleneck.groups)
            self.conv1, self.norm1 = conv(in_dim, inner, 1), make_norm(inner)
            self.conv2, self.norm2 = conv(inner, inner, 3, make, **how), make_norm(inner)
            self.conv3, self.norm3 = conv(inner, out_dim, 1), make_norm(out_dim, last=True)
        else:
            self.conv1, self.norm1 = conv(in_dim, dim, 3, stride=stride), make_norm(dim)
            self.conv2, self.norm2 = conv(dim, dim, 3), make_norm(dim, last=True)
        self.has_shortcut = stride != 1 or in_dim != out_dim
        if self.has_shortcut:
            self.shortcut_conv, self.shortcut_norm = conv(in_dim, out_dim, 1, stride=stride), make_norm(out_dim)

    def __call__(
        self, x: Float[Array, "B H W C"], valid: Bool[Array, "B H W"] | None, *, dropout_key=None
    ) -> Float[Array, "B h w D"]:
        """`valid` is True on real pixels of x. A ResNet has no dropout; LayerStack passes the key to every layer."""
        del dropout_key
        valid_out = _subsample(valid, self.stride)
        shortcut = self.shortcut_norm(self.shortcut_conv(x), valid_out) if self.has_shortcut else x
        if self.bottleneck:
            y = relu(self.norm1(self.conv1(x), valid))
            y = relu(self.norm2(self.conv2(y), valid_out))
            y = self.norm3(self.conv3(y), valid_out)
        else:
            y = relu(self.norm1(self.conv1(x), valid_out))
            y = self.norm2(self.conv2(y), valid_out)
        return masked_relu(y + shortcut)


class Stage(nnx.Module):
    """Blocks of one resolution: the first changes stride and channels, the rest are alike and stacked."""

    def __init__(self, in_dim, dim, num_blocks, *, bottleneck, stride, dilation, compute, rngs, **how):
        shared = dict(bottleneck=bottleneck, compute=compute, rngs=rngs, **how)
        out_dim = 4 * dim if bottleneck else dim
        # torchvision's DC5: the block that would have had the stride keeps dilation 1, only the later ones have 2.
        self.first = Block(in_dim, dim, stride=stride, **shared)
        self.rest = LayerStack(Block, num_blocks - 1, out_dim, dim, dilation=dilation, unroll_on_cpu=True, **shared)
        self.rematerialize = compute.rematerialize
        self.stride = stride

    def __call__(self, x, valid):
        x = apply_rematerialized(self.first, x, valid) if self.rematerialize else self.first(x, valid)
        return self.rest(x, _subsample(valid, self.stride))


class ResNet(nnx.Module):
    """Features at the wanted strides, `.channels` wide. Stages after the last wanted one do not exist.

    The stem counts as the first of the `frozen_stages` (0 trains everything, 2 freezes the stem and the first stage as
    the published detectors do, 5 freezes all). No gradient passes through frozen stages. `dilation` keeps the last
    stage at stride 16 (DC5). ResNeXt divides the 3x3 convolutions of bottlenecks, `inner_ratio` times as wide, into
    `groups`: 64x4d (64 groups of 4 channels in the first stage) has an `inner_ratio` of 4. In the last
    `deformable_stages` of those that exist they are deformable (DCN v2). Parameters are float32 and computation is in
    `dtype`.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        strides: Sequence[int],
        norm: str,
        frozen_stages: int,
        dilation: bool,
        groups: int,
        inner_ratio: int,
        deformable_stages: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        dtype = compute.dtype
        _check_bottlenecks(depth, width, groups, inner_ratio, deformable_stages)
        stage_strides = _check(depth, width, tuple(strides), norm, frozen_stages, dilation)
        first_deformable = len(stage_strides) - deformable_stages
        _check_deformable(deformable_stages, len(stage_strides), frozen_stages)
        blocks, bottleneck = DEPTHS[depth]

        def make_norm(dim, last=False):
            if norm == "frozen_batch_norm":
                return FrozenBatchNorm(dim, dtype=dtype)
            # The last norm of a block starts at zero (arXiv:1803.08494, section 4.1): blocks start as identities.
            return GroupNorm(dim, initial_scale=0.0 if last else 1.0, dtype=dtype)

        self.frozen_stages = frozen_stages
        self.portable = compute.portable
        self.stem_conv = Conv(3, width, 7, stride=2, frozen=frozen_stages > 0, compute=compute, rngs=rngs)
        self.stem_norm = make_norm(width)
        self.stages: nnx.List[Stage] = nnx.List()
        self.strides = tuple(strides)
        self.stage_strides = stage_strides
        self.channels = {}
        in_dim = width
        shared = dict(make_norm=make_norm, compute=compute, rngs=rngs)
        for s, stride in enumerate(stage_strides):
            dim = width * 2**s
            dilated = dilation and s == 3
            how: dict = dict(stride=1 if s == 0 or dilated else 2, dilation=2 if dilated else 1)
            how |= dict(frozen=frozen_stages > s + 1)
            how |= dict(bottleneck=Bottleneck(groups, inner_ratio, s >= first_deformable) if bottleneck else None)
            self.stages.append(Stage(in_dim, dim, blocks[s], **how, **shared))
            in_dim = 4 * dim if bottleneck else dim
            if stride in self.strides:
                self.channels[stride] = in_dim

    def __call__(
        self, image: Float[Array, "B H W 3"], pixel_valid: Bool[Array, "B H W"] | None = None
    ) -> dict[int, Float[Array, "B h w C"]]:
        """{stride: features of ceil(size / stride) cells}. Only group norm looks at `pixel_valid`; None is all real."""
        valid = _subsample(pixel_valid, 2)
        x = jax.nn.relu(self.stem_norm(self.stem_conv(image), valid))
        x = max_pool(x, portable=self.portable)
        valid = _subsample(valid, 2)
        if valid is not None and isinstance(self.stem_norm, GroupNorm):
            # The first padded cell behind an even number of real ones pools the last of them; padding stays zero.
            x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        if self.frozen_stages > 0:
            x = jax.lax.stop_gradient(x)
        features = {}
        for s, (stage, stride) in enumerate(zip(self.stages, self.stage_strides, strict=True)):
            x = stage(x, valid)
            valid = _subsample(valid, stage.stride)
            if self.frozen_stages > s + 1:
                x = jax.lax.stop_gradient(x)
            if stride in self.strides:
                features[stride] = x
        return features


def _check_bottlenecks(depth, width, groups, inner_ratio, deformable_stages) -> None:
    """Raises UserError for groups that do not divide the channels, and for what blocks of this depth do not have."""
    check_choice("config.model.backbone.depth", depth, DEPTHS)
    for name, value, least in (
        ("groups", groups, 1),
        ("inner_ratio", inner_ratio, 1),
        ("deformable_stages", deformable_stages, 0),
    ):
        check_at_least(f"config.model.backbone.{name}", value, least)
        if value > least and not DEPTHS[depth][1]:
            raise UserError(f"config.model.backbone.{name} needs bottlenecks (depth 50 or 101), not depth {depth}.")
    if (inner := inner_ratio * width) % groups:
        raise UserError(
            f"config.model.backbone.groups is {groups}, which does not divide the {inner} channels of the first 3x3 "
            "convolutions (config.model.backbone.width times inner_ratio)."
        )


def _check_deformable(deformable_stages, num_stages, frozen_stages) -> None:
    """Raises UserError for deformable convolutions that would never learn where to look."""
    trained = max(num_stages - max(frozen_stages - 1, 0), 0)
    if deformable_stages > trained:
        raise UserError(
            f"config.model.backbone.deformable_stages is {deformable_stages}, but only {trained} of the {num_stages} "
            "stages that config.model.strides needs are trained (config.model.backbone.frozen_stages)."
        )


def _check(depth, width, strides, norm, frozen_stages, dilation) -> tuple[int | None, ...]:
    """The stride of each stage that must exist; a UserError for settings that contradict each other."""
    check_choice("config.model.backbone.norm", norm, ("frozen_batch_norm", "group_norm"))
    if not 0 <= frozen_stages <= 5:
        raise UserError(f"config.model.backbone.frozen_stages is {frozen_stages}; it can be 0 to 5.")
    if norm == "group_norm" and frozen_stages:
        raise UserError(
            "config.model.backbone.norm is group_norm, which trains from scratch, but frozen_stages is "
            f"{frozen_stages}: untrained stages would stay random; set config.model.backbone.frozen_stages=0."
        )
    if width < 2 or width % 2:
        raise UserError(f"config.model.backbone.width is {width}; it must be an even number of channels.")
    if dilation and not DEPTHS[depth][1]:
        raise UserError(f"config.model.backbone.dilation needs bottleneck blocks (depth 50 or 101), not depth {depth}.")
    valid_strides = STRIDES[:3] if dilation else STRIDES
    if not strides or not set(strides) <= set(valid_strides):
        raise UserError(
            f"config.model.strides is {strides}; a ResNet{' with dilation' if dilation else ''} has the strides "
            f"{', '.join(map(str, valid_strides))}."
        )
    if not dilation:
        return STRIDES[: STRIDES.index(max(strides)) + 1]
    if max(strides) != 16:
        raise UserError(
            f"config.model.backbone.dilation changes only stride 16, which config.model.strides {strides} lacks."
        )
    return (4, 8, None, 16)  # the features before the dilated stage have no entry of their own

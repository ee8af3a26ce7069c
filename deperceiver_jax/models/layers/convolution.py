"""Square convolutions, written for each platform as its compiler runs them best; the numbers are the same.

Where x has more channels than the kernel takes, both are divided into groups, each of which sees its own channels only.
Depthwise: every channel is a group of its own, and has one result.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import lecun_normal, zeros

LARGE = 800  # cells of a map from which on a CPU takes the gradients of kernels of size 1 in loops
HEAVY = 2**17  # numbers of a map from which on it takes those of larger kernels so,
FEW = 16  # unless its channels are fewer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C/groups D"], stride: int, dilation: int
) -> Float[Array, "B h w D"]:
    """Pads (k - 1) / 2 * dilation on every side. A convolution of size 1 has one group.

    XLA's CPU code for a convolution of size 1 takes several times as long as for the same matrix product, above all for
    the kernel's gradient. Other platforms get the convolution.
    """
    on_cpu = functools.partial(_forward_on_cpu, stride, dilation)
    return by_platform(x, kernel, cpu=on_cpu, default=_plain(stride, dilation))


def _forward(x, kernel, stride, dilation):
    return convolution(x, kernel, stride, dilation), (x, kernel)


def _backward(stride, dilation, kept, gradient):
    on_cpu, default = (functools.partial(how, stride, dilation) for how in (_backward_on_cpu, _transposed))
    return by_platform(*kept, gradient, cpu=on_cpu, default=default)


convolution.defvjp(_forward, _backward)


def plain_convolution(x, kernel, stride: int, dilation: int):
    """`convolution` as one operation on every platform."""
    return _plain(stride, dilation)(x, kernel)


class PaddedConvolution(nnx.Conv):
    """nnx.Conv of odd size, computed by `convolution`, with its padding."""

    def __init__(
        self, in_dim: int, out_dim: int, size: int, *, stride: int = 1, groups: int = 1, compute: Compute, rngs, **start
    ):
        """`start`: kernel_init, and bias_init or use_bias."""
        if unknown := start.keys() - {"kernel_init", "bias_init", "use_bias"}:
            raise TypeError(f"PaddedConvolution takes no {', '.join(sorted(unknown))}.")
        how: dict = dict(strides=stride, padding=size // 2, feature_group_count=groups, dtype=compute.dtype)
        start = {"kernel_init": lecun_normal(), "bias_init": zeros, **start}
        super().__init__(in_dim, out_dim, (size, size), **how, rngs=rngs, **start)
        self.stride = stride
        self.portable = compute.portable

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        convolve = plain_convolution if self.portable else convolution
        y = convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, 1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None, None]


def _plain(stride: int, dilation: int):
    def convolve(x, kernel):
        padding = kernel.shape[0] // 2 * dilation
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[3] // kernel.shape[2],
        )

    return convolve


def _transposed(stride, dilation, x, kernel, gradient):
    """The gradients of the convolution, which is linear in either of its factors."""
    convolve = _plain(stride, dilation)
    (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
    (of_kernel,) = jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(gradient)
    return of_x, of_kernel


def _forward_on_cpu(stride, dilation, x, kernel):
    if _is_depthwise(x, kernel):
        return _depthwise(stride, dilation, x, kernel)
    if len(kernel) > 1:
        return _plain(stride, dilation)(x, kernel)
    return jnp.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], kernel[0, 0])


def _backward_on_cpu(stride, dilation, x, kernel, gradient):
    if _is_depthwise(x, kernel):
        return _backward_of_depthwise(stride, dilation, x, kernel, gradient)
    if len(kernel) > 1:
        of_x, of_kernel = _transposed(stride, dilation, x, kernel, gradient)
        if kernel.shape[2] < x.shape[3]:
            of_kernel = _gradient_of_groups(stride, dilation, x, kernel, gradient)
        elif kernel.shape[2] >= FEW and gradient.shape[1] * gradient.shape[2] * kernel.shape[2] >= HEAVY:
            of_kernel = _gradient_of_kernel(stride, dilation, x, kernel, gradient)
        if (len(kernel), stride, dilation) == (3, 2, 1) and kernel.shape[2] == x.shape[3]:
            of_x = _gradient_of_halved(x.shape, kernel, gradient)
        return of_x, of_kernel
    seen = x[:, ::stride, ::stride]
    # XLA transposes the first factor: the narrower one costs less.
    if kernel.shape[2] <= kernel.shape[3]:
        of_kernel = _summed(seen, gradient)
    else:
        of_kernel = _summed(gradient, seen).T
    of_seen = jnp.einsum("bhwd,cd->bhwc", gradient, kernel[0, 0])
    if stride == 1:
        return of_seen, of_kernel[None, None]
    lengths = zip(x.shape[1:3], of_seen.shape[1:3], strict=True)
    edges = [(0, length - (stride * (count - 1) + 1), stride - 1) for length, count in lengths]
    of_x = jax.lax.pad(of_seen, jnp.zeros((), of_seen.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return of_x, of_kernel[None, None]


def _summed(x, y):
    """einsum("bhwc,bhwd->cd"), on large maps in two steps of a loop, before which XLA makes both factors.

    Else it computes the first one anew to transpose it, from all that it was made of, which takes several times as long
    as the product. Images stay apart: they may be on several devices.
    """
    batch, height, width, _ = x.shape
    half, odd = divmod(height * width, 2)
    x, y = (factor.reshape(batch, -1, factor.shape[3]) for factor in (x, y))
    if odd or 2 * half < LARGE:
        return jnp.einsum("bnc,bnd->cd", x, y)

    def of_half(k):
        return _product("bnc,bnd->cd", *(jax.lax.dynamic_slice_in_dim(z, k * half, half, axis=1) for z in (x, y)))

    first, second = jax.lax.map(of_half, jnp.arange(2))
    return (first + second).astype(x.dtype)


def _product(axes, x, y):
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _gradient_of_kernel(stride, dilation, x, kernel, gradient):
    """A matrix product for each tap, one by one; XLA's CPU code for all at once takes up to four times as long.

    Of each image cells are laid one after the other, those of each residue of the stride together, in rows as long as
    the gradient's with a tap's reach behind it. What a tap sees is one run of them, then, and needs no gathering; at
    the ends of rows the gradient is zero.
    """
    size, _, channels, width = kernel.shape
    batch, *extent, _ = gradient.shape
    edge, reach = size // 2 * dilation, (size - 1) * dilation // stride
    rows, columns = (length + reach for length in extent)
    margins = [
        (edge, stride * cells - edge - length, 0) for cells, length in zip((rows, columns), x.shape[1:3], strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    x = x.reshape(batch, rows, stride, columns, stride, channels).transpose(2, 4, 0, 1, 3, 5)
    x = x.reshape(stride**2, batch, rows * columns, channels)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, reach * columns + reach), (0, 0)])
    gradient = jnp.pad(gradient, [(0, 0), (0, reach), (0, reach), (0, 0)]).reshape(batch, rows * columns, width)
    gradient = gradient.transpose(2, 0, 1)  # once, since it is the first factor that XLA transposes
    taps = [divmod(tap * dilation, stride) for tap in range(size)]
    runs = [(down * stride + right, row * columns + column) for row, down in taps for column, right in taps]

    def of_tap(run):
        residue, start = run
        seen = jax.lax.dynamic_slice(x, (residue, 0, start, 0), (1, batch, rows * columns, channels))[0]
        return _product("dbn,bnc->dc", gradient, seen).astype(x.dtype)

    return jax.lax.map(of_tap, jnp.asarray(runs)).reshape(size, size, width, channels).swapaxes(2, 3)


def _gradient_of_groups(stride, dilation, x, kernel, gradient):
    """Of a kernel in groups, tap by tap; XLA's CPU code for all at once takes a hundred times as long."""
    size, _, channels, _ = kernel.shape
    batch, height, width, _ = gradient.shape
    groups, edge = x.shape[3] // channels, size // 2 * dilation
    x = _padded(x, edge)
    gradient = gradient.reshape(batch, height, width, groups, -1)

    def of_tap(i, j):
        rows, columns = (
            slice(k * dilation, k * dilation + stride * (count - 1) + 1, stride)
            for k, count in ((i, height), (j, width))
        )
        seen = x[:, rows, columns].reshape(batch, height, width, groups, channels)
        return jnp.einsum("bhwgc,bhwgd->cgd", seen, gradient)

    return jnp.stack([of_tap(i, j) for i in range(size) for j in range(size)]).reshape(kernel.shape)


def _padded(x, edge):
    return jnp.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)])


def _is_depthwise(x, kernel):
    return kernel.shape[2] == 1 and x.shape[3] == kernel.shape[3] > 1


def _depthwise(stride, dilation, x, kernel):
    """A sum over shifted maps, row by row of the kernel: XLA's own convolution takes many times as long, and a sum over
    all taps at once becomes part of whatever takes its result, cell by cell."""
    size, edge = len(kernel), len(kernel) // 2 * dilation
    height, width = x.shape[1:3]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = _padded(x, edge).astype(wide)
    seen = [slice(j * dilation, j * dilation + width, stride) for j in range(size)]

    def add_row(total, row_and_taps):
        row, taps = row_and_taps  # taps: [k, 1, C]
        below = jax.lax.dynamic_slice_in_dim(padded, row, height, axis=1)[:, ::stride]
        return total + sum(below[:, :, seen[j]] * taps[j][None, None] for j in range(size)), None

    start = jnp.zeros((len(x), *(-(-length // stride) for length in (height, width)), x.shape[3]), wide)
    rows = jnp.arange(size) * dilation
    return jax.lax.scan(add_row, start, (rows, kernel.astype(wide)))[0].astype(x.dtype)


def _backward_of_depthwise(stride, dilation, x, kernel, gradient):
    """The gradient of x is that of the result, with holes where the stride left cells out, through the turned kernel;
    the kernel's is a sum over cells for each tap, one by one."""
    size, edge = len(kernel), len(kernel) // 2 * dilation
    holes = [
        (0, length - stride * (cells - 1) - 1, stride - 1)
        for length, cells in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *holes, (0, 0, 0)])
    of_x = _depthwise(1, dilation, spread, kernel[::-1, ::-1])
    padded = _padded(x, edge)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def of_tap(tap):
        seen = jax.lax.dynamic_slice(padded, (0, *tap, 0), x.shape)[:, ::stride, ::stride]
        return jnp.sum(seen.astype(wide) * gradient.astype(wide), axis=(0, 1, 2))

    taps = dilation * jnp.asarray([(i, j) for i in range(size) for j in range(size)])
    return of_x, jax.lax.map(of_tap, taps).reshape(kernel.shape).astype(kernel.dtype)


def _gradient_of_halved(shape, kernel, gradient):
    """Of the input of a convolution of size 3 and stride 2, without the holes that XLA's own would multiply.

    An even row 2 m reaches row m of the result through tap 1, an odd one rows m and m + 1 through taps 2 and 0; so do
    columns. The four kinds of cells are the channels of one convolution of size 2, in which seven taps of sixteen are
    empty.
    """
    batch, height, width, channels = shape
    taps = jnp.pad(kernel, [(0, 1), (0, 1), (0, 0), (0, 0)])  # the fourth is empty
    rows = jnp.asarray([[1, 3], [2, 0]])  # [even or odd, row m or m + 1]
    taps = taps[rows][:, :, rows]  # [kind of row, row, kind of column, column, C, D]
    taps = taps.transpose(1, 3, 5, 0, 2, 4).reshape(2, 2, kernel.shape[3], 4 * channels)
    gradient = jnp.pad(gradient, [(0, 0), (0, 1), (0, 1), (0, 0)])
    dimensions = ("NHWC", "HWIO", "NHWC")
    cells = jax.lax.conv_general_dilated(gradient, taps, (1, 1), "VALID", dimension_numbers=dimensions)
    _, rows, columns, _ = cells.shape
    cells = cells.reshape(batch, rows, columns, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]

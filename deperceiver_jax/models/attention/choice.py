"""Dense attention without its whole matrix: in blocks of queries, by cuDNN, by Pallas kernels; and which one is used.

All of them equal plain attention in values and gradients, up to the order of sums. Which one a program gets depends on
the size of the matrix and on the platform that the program is compiled for, not on the one that compiles it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deperceiver_jax.models.attention.dense import dense_attention
from deperceiver_jax.models.kernels.each_device import on_each_device
from deperceiver_jax.models.kernels.flash_attention import RESULTS, flash_attention
from deperceiver_jax.models.kernels.log_gaussian import LogGaussian
from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.linear import split_key

IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn", "flash")
# Matrices of fewer entries a head stay as they are with "auto": that is fastest, and they are small in memory.
LARGE = 2**20
# Entries a head of a block of queries. On a TPU v5e, 8 images and 8 heads of such blocks stay in its on-chip memory.
BLOCK = 2**18
FEWEST_QUERIES = 128  # in a block: a matrix unit's rows


def attention(
    implementation: str,
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None,
    bias: Float[Array, "B Hb Qb K"] | LogGaussian | None,
    *,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> Float[Array, "B H Q E"]:
    """dense_attention, or what replaces it; `implementation` is config.attention.

    auto: dense for small matrices, else the kernel of the target platform, or blocks where it has none that fits;
    xla: always dense; chunked: always in blocks; cudnn, flash: that kernel, and blocks wherever it does not run;
    portable, of Compute: dense for small matrices, else blocks.
    Attention that drops goes in blocks on GPUs. What the TPU's kernel drops is drawn in another way than elsewhere, at
    the same rate. A LogGaussian is never a whole map: blocks and the TPU's kernel compute their own part of it.
    """
    entries = query.shape[2] * key.shape[2]
    large = isinstance(entries, int) and entries >= LARGE  # a file for pictures of any size has symbols for sizes
    drops: dict = dict(dropout_rate=dropout_rate, dropout_key=dropout_key)
    arrays = (query, key, value, key_valid, bias)
    if implementation == "xla" or (implementation in ("auto", "portable") and not large):
        return dense_attention(*arrays, **drops)
    if implementation == "portable":
        return chunked_attention(*arrays, **drops)
    kernels = {}
    drop = dropout_rate > 0.0 and dropout_key is not None
    if implementation not in ("chunked", "cudnn"):
        if drop:
            arrays = (*arrays, jax.random.bits(dropout_key, query.shape[:2], jnp.uint32).astype(jnp.int32))
        rate = dropout_rate if drop else 0.0
        kernels["tpu"] = on_each_device(functools.partial(flash_attention, dropout_rate=rate))
    # cuDNN's operation cannot even be traced where there is no GPU.
    on_gpu = implementation not in ("chunked", "flash") and jax.default_backend() == "gpu"
    if on_gpu and not drop and cudnn_takes(*arrays):
        kernels["cuda"] = cudnn_attention

    def in_blocks(*arrays):
        return chunked_attention(*arrays[:5], **drops)

    choose = functools.partial(by_platform, default=in_blocks, **kernels)
    # For the backward pass the inputs are kept, and what takes a kernel to compute again. A switch between platforms
    # would keep what each of them does.
    keep = jax.checkpoint_policies.save_only_these_names(RESULTS)
    return jax.checkpoint(choose, policy=keep)(*arrays)


def chunked_attention(
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    value: Float[Array, "B H K E"],
    key_valid: Bool[Array, "B K"] | None = None,
    bias: Float[Array, "B Hb Qb K"] | LogGaussian | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B H Q E"]:
    """dense_attention, for one block of queries after the other. The backward pass computes each block's matrix again.

    Exact, since a query's softmax needs all keys but no other query. Each block drops with a key of its own.
    """
    batch, heads, num_queries, width = query.shape
    block = max(BLOCK // key.shape[2], FEWEST_QUERIES)
    if block >= num_queries:
        return jax.checkpoint(functools.partial(dense_attention, dropout_rate=dropout_rate))(
            query, key, value, key_valid, bias, dropout_key=dropout_key
        )
    count = -(-num_queries // block)

    def in_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - num_queries), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, block, x.shape[3]), 2, 0)

    if isinstance(bias, LogGaussian):
        biases, bias_of_block = tuple(map(in_blocks, bias[:2])), lambda x: LogGaussian(x[0], x[1], bias.place)
    elif bias is None or bias.shape[2] == 1:
        biases, bias_of_block = None, lambda block: bias
    else:
        biases, bias_of_block = in_blocks(bias), lambda block: block
    keys = None if dropout_key is None else jnp.stack(split_key(dropout_key, count))

    @jax.checkpoint
    def attend(block_query, block_bias, block_key):
        block_bias = bias_of_block(block_bias)
        drops = dict(dropout_rate=dropout_rate, dropout_key=block_key)
        return dense_attention(block_query, key, value, key_valid, block_bias, **drops)

    attended = jax.lax.map(lambda arrays: attend(*arrays), (in_blocks(query), biases, keys))
    return jnp.moveaxis(attended, 0, 2).reshape(batch, heads, count * block, -1)[:, :, :num_queries]


def cudnn_takes(query, key, value, key_valid, bias) -> bool:
    """Whether cuDNN's attention computes this: half precision, heads of at most 128 channels that 8 divides, no bias
    (it would be rounded to half precision), and with a mask even numbers of queries and keys."""
    return (
        all(x.dtype == query.dtype for x in (key, value))
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[3] == value.shape[3]
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 128
        and bias is None
        and (key_valid is None or query.shape[2] % 2 == key.shape[2] % 2 == 0)
    )


def cudnn_attention(query, key, value, key_valid=None, bias=None):
    """dense_attention by cuDNN, for what `cudnn_takes`."""
    del bias
    batch, _, num_queries, _ = query.shape
    mask = None
    if key_valid is not None:
        mask = jnp.broadcast_to(key_valid[:, None, None], (batch, 1, num_queries, key.shape[2]))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn").swapaxes(1, 2)
    if key_valid is None:
        return attended
    return jnp.where(jnp.any(key_valid, axis=1)[:, None, None, None], attended, jnp.zeros_like(attended))

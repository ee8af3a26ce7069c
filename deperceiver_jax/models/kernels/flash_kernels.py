"""The Pallas kernels of flash_attention.py: one block of queries and one of keys at a time, on a TPU.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2. Logits are [keys, queries]: statistics of a query are
rows, and sums over keys run down the lanes. Biases of the logits are a map, or a Gaussian's `spots` (of the queries)
and `places` (of the keys), from which it is computed here.

Dropout draws no numbers that would have to be kept: whether a pair of a query and a key is dropped is a hash of the
head's seed and of both positions, so that the backward pass finds it again, whatever the blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from deperceiver_jax.models.kernels.pallas import SUBLANES, dot

MASKED = -1e30
# Odd factors, those of the hash's finaliser last; int32 products wrap as they should.
_FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0x85EBCA6B, 0xC2B2AE35], np.uint32).view(np.int32).tolist()
_OF_QUERY, _OF_KEY, _FIRST, _SECOND = _FACTORS


def dropped_share(seed: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """A number of 0 to 1, uniform and apart for every seed, query and key, all int32 that broadcast together.

    A pair is dropped where it is below the rate. The hash is MurmurHash3's finaliser (A. Appleby, public domain), of
    the seed and the query, then of both and the key.
    """
    return (_shift(_mix(_mix(seed ^ (query * _OF_QUERY)) + key * _OF_KEY), 8)).astype(jnp.float32) * 2.0**-24


def _mix(x):
    x = (x ^ _shift(x, 16)) * _FIRST
    x = (x ^ _shift(x, 13)) * _SECOND
    return x ^ _shift(x, 16)


def _shift(x, places):
    return jax.lax.shift_right_logical(x, jnp.full(x.shape, places, jnp.int32))


def _logits(query, key, biases):
    """[keys, queries]"""
    logits = dot(key[0, 0], query[0, 0], 0, 0)
    if len(biases) == 1:
        logits += biases[0][0, 0].astype(jnp.float32)
    if len(biases) == 2:
        logits -= 0.5 * sum(jnp.square(distance) for distance, _ in _distances(*biases))
    return logits


def _distances(spots, places):
    """Along x and y: ([keys, queries] how far a key is from a query's centre, in widths; [keys, 1] where it is)."""
    spots, places = spots[0, 0], places[0, 0].T
    for axis in (0, 1):
        place = places[:, axis : axis + 1]
        yield place * spots[axis : axis + 1] - spots[2 + axis : 3 + axis], place


def _gradient_of_spots(d_logits, spots, places):
    """[8, queries] of 1 / width and of the centre in widths, each along x and y, and four rows of zeros."""
    of_width, of_center = [], []
    for distance, place in _distances(spots, places):
        of_distance = d_logits * distance
        of_width.append(-jnp.sum(of_distance * place, axis=0, keepdims=True))
        of_center.append(jnp.sum(of_distance, axis=0, keepdims=True))
    rows = [*of_width, *of_center]
    return jnp.concatenate([*rows, jnp.zeros((SUBLANES - len(rows), rows[0].shape[1]), jnp.float32)], axis=0)


def _kept(seeds, rate, shape, block_query, block_key):
    """[keys, queries]: 1 / (1 - rate) where a pair is kept, else 0. `shape` of this block, whose numbers are given."""
    num_keys, num_queries = shape
    query = block_query * num_queries + jax.lax.broadcasted_iota(jnp.int32, (1, num_queries), 1)
    key = block_key * num_keys + jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
    return jnp.where(dropped_share(seeds[0, 0][:, :1], query, key) < rate, 0.0, 1.0 / (1.0 - rate))


def forward_kernel(query, key, value, *refs, num_biases, rate):
    biases, seeds, (attended, lse, top, total, sums) = _split(refs, num_biases, rate)
    outer, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def start():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    logits = _logits(query, key, biases)
    new_top = jnp.maximum(top[...], jnp.max(logits, axis=0, keepdims=True))
    weights = jnp.exp(logits - new_top)
    shrink = jnp.exp(top[...] - new_top)
    top[...] = new_top
    total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    if rate:
        weights *= _kept(seeds, rate, weights.shape, outer, step)
    sums[...] = sums[...] * shrink + dot(value[0, 0], weights.astype(value.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        nothing = (top[...] < MASKED / 2) | (total[...] == 0.0)  # no key of this query is real
        safe = jnp.where(nothing, 1.0, total[...])
        attended[0, 0] = jnp.where(nothing, 0.0, sums[...] / safe).astype(attended.dtype)
        lse[0, 0] = jnp.where(nothing, -MASKED, top[...] + jnp.log(safe))  # then every probability is 0


def _split(refs, num_biases, rate):
    """(biases, seeds where there is dropout, the rest)"""
    count = num_biases + bool(rate)
    return refs[:num_biases], refs[num_biases] if rate else None, refs[count:]


def _probabilities_and_gradient(query, key, value, biases, gradient, lse, delta, dropout):
    """(probabilities that weigh the values, gradient of the logits), both [keys, queries]."""
    probabilities = jnp.exp(_logits(query, key, biases) - lse[0, 0])
    of_weights = dot(value[0, 0], gradient[0, 0], 0, 0)
    if dropout is None:
        return probabilities, probabilities * (of_weights - delta[0, 0])
    kept = _kept(*dropout[:2], probabilities.shape, *dropout[2:])
    return probabilities * kept, probabilities * (of_weights * kept - delta[0, 0])


def query_kernel(query, key, value, *refs, num_biases, rate):
    """Gradients of the queries, and of a map or of the queries' spots."""
    biases, seeds, (gradient, lse, delta, d_query, *refs) = _split(refs, num_biases, rate)
    d_biases, (query_sums, *spot_sums) = refs[: min(num_biases, 1)], refs[min(num_biases, 1) :]
    outer, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def start():
        for sums in (query_sums, *spot_sums):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    dropout = (seeds, rate, outer, step) if rate else None
    _, d_logits = _probabilities_and_gradient(query, key, value, biases, gradient, lse, delta, dropout)
    if num_biases == 1:
        d_biases[0][0, 0] = d_logits.astype(d_biases[0].dtype)
    if num_biases == 2:
        spot_sums[0][...] += _gradient_of_spots(d_logits, *biases)
    query_sums[...] += dot(key[0, 0], d_logits.astype(key.dtype), 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        d_query[0, 0] = query_sums[...].astype(d_query.dtype)
        if num_biases == 2:
            d_biases[0][0, 0] = spot_sums[0][...]


def key_kernel(query, key, value, *refs, num_biases, rate):
    """Gradients of the keys and values."""
    biases, seeds, (gradient, lse, delta, d_key, d_value, key_sums, value_sums) = _split(refs, num_biases, rate)
    outer, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def start():
        key_sums[...] = jnp.zeros(key_sums.shape, jnp.float32)
        value_sums[...] = jnp.zeros(value_sums.shape, jnp.float32)

    dropout = (seeds, rate, step, outer) if rate else None
    probabilities, d_logits = _probabilities_and_gradient(query, key, value, biases, gradient, lse, delta, dropout)
    key_sums[...] += dot(query[0, 0], d_logits.astype(query.dtype), 1, 1)
    value_sums[...] += dot(gradient[0, 0], probabilities.astype(gradient.dtype), 1, 1)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        d_key[0, 0] = key_sums[...].astype(d_key.dtype)
        d_value[0, 0] = value_sums[...].astype(d_value.dtype)

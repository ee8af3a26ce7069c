"""SMCA's encoder: who attends to whom, and with whose weights; modulation in every implementation."""

import collections
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import smca
from deperceiver_jax.models.attention import choice as attention_choice
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.detr.transformer import EncoderLayer
from deperceiver_jax.models.smca import spatial_modulation
from deperceiver_jax.models.smca.spatial_modulation import ModulationFields, SpatialModulation
from deperceiver_jax.models.smca.transformer import AttentionEncoder, AttentionFields, LevelEncoderLayer
from tests.drawn_arrays import FLOAT32, answer_of, level_tokens

SIZES = ((2, 3), (1, 2))
LEVEL = np.array([0] * 6 + [1] * 2)


def make_tokens():
    rng = np.random.default_rng(0)
    tokens, position = (rng.standard_normal((2, 8, 8)).astype(np.float32) for _ in range(2))
    valid = np.ones((2, 8), bool)
    valid[1, 5] = False
    image = level_tokens([np.ones((2, *size), bool) for size in SIZES])
    return image.replace(tokens=tokens, position=position, valid=valid)


def encoder(layout, **sharing):
    sharing = {"share_attention": True, "share_mlp": True, **sharing}
    fields = AttentionFields(layout=layout, num_heads=2, mlp_dim=16, **sharing)
    return AttentionEncoder(8, fields, num_levels=2, dropout=0.0, compute=FLOAT32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "layout, share", [(layout, share) for layout in (("intra",), ("multi",)) for share in (True, False)]
)
def test_intra_stays_within_its_level(layout, share):
    tokens = make_tokens()
    encode = encoder(layout, share_attention=share, share_mlp=share)
    before = answer_of(encode, tokens).tokens
    for level in (0, 1):
        changed = tokens.tokens + np.float32(3 * (LEVEL == level))[None, :, None]
        difference = np.abs(answer_of(encode, tokens.replace(tokens=changed)).tokens - before).max(axis=(0, 2))
        assert difference[LEVEL == level].min() > 1e-3
        assert (difference[LEVEL != level].max() > 1e-4) == (layout == ("multi",))


def test_padding_is_no_key():
    tokens = make_tokens()
    for layout in (("intra", "intra"), ("multi", "intra")):
        encode = encoder(layout)
        changed = tokens.tokens.copy()
        changed[1, 5] += 5
        changed, before = (answer_of(encode, x).tokens for x in (tokens.replace(tokens=changed), tokens))
        difference = np.abs(changed - before).max(axis=-1)
        assert difference[1, 5] > 1e-3 and not np.delete(difference[1], 5).any() and not difference[0].any()


def test_layers_of_a_layout_come_in_order():
    """A stack of five, applied one by one."""
    tokens = make_tokens()
    layout = ("intra", "intra", "multi", "intra", "intra")
    encode = encoder(layout)

    @jax.jit
    def both_ways(tokens):
        x = tokens.tokens
        for i, kind in enumerate(layout):
            x = encode.layers.layer(i)(x, tokens, kind == "multi")
        return encode(tokens).tokens, x

    np.testing.assert_allclose(*both_ways(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend_across", [False, True])
def test_separate_weights_that_are_equal_are_shared_ones(attend_across):
    """And a layer whose weights all levels share is DETR's."""
    tokens = make_tokens()
    shared, apart = (
        LevelEncoderLayer(
            8,
            AttentionFields(("intra",), num_heads=2, mlp_dim=16, share_attention=share, share_mlp=share),
            num_levels=2,
            dropout=0.0,
            compute=FLOAT32,
            rngs=nnx.Rngs(seed),
        )
        for seed, share in enumerate((True, False))
    )
    detr = EncoderLayer(8, 2, mlp_dim=16, dropout=0.0, compute=FLOAT32, rngs=nnx.Rngs(2))
    for level in (0, 1):
        nnx.update(apart.attentions[level], nnx.state(shared.attentions[0]))
        nnx.update(apart.mlps[level], nnx.state(shared.mlps[0]))
    nnx.update(detr.attention, nnx.state(shared.attentions[0]))
    nnx.update(detr.mlp, nnx.state(shared.mlps[0]))

    @jax.jit
    def answers(tokens):
        ours = [layer(tokens.tokens, tokens, attend_across) for layer in (shared, apart)]
        arrays = (tokens.tokens, tokens.position, tokens.valid)
        if attend_across:
            return *ours, detr(*arrays)
        ends = list(itertools.accumulate(tokens.lengths))
        parts = [slice(end - length, end) for end, length in zip(ends, tokens.lengths, strict=True)]
        return *ours, jnp.concatenate([detr(*(a[:, part] for a in arrays)) for part in parts], axis=1)

    answer, of_apart, expected = answers(tokens)
    np.testing.assert_allclose(of_apart, answer, atol=1e-5)
    np.testing.assert_allclose(answer, expected, atol=1e-5)


def modulated():
    """Attention whose heads look in different places, by queries that weigh the levels.

    (implementation -> its answer and the gradients of a sum of it, as a function of arrays; the arrays).
    """
    fields = ModulationFields(**{**smca.get_config("r50_multiscale").model.decoder.to_dict(), "num_heads": 2})
    rng, tokens = np.random.default_rng(0), make_tokens()
    query = rng.standard_normal((2, 6, 8)).astype(np.float32)
    center = rng.uniform(8, 40, (2, 6, 2)).astype(np.float32)

    def build():
        spatial = SpatialModulation(8, fields, strides=(16, 32), rngs=nnx.Rngs(0))
        return spatial, MultiHeadAttention(8, 2, compute=FLOAT32, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    state = jax.tree.map(lambda x: (0.5 * rng.standard_normal(x.shape)).astype(x.dtype), state)

    def make_step(implementation):
        def loss(state):
            spatial, attention = nnx.merge(graphdef, state)
            attention.implementation = implementation
            bias, weight = spatial(query, center, tokens)
            levels = dict(segments=tokens.lengths, segment_weight=weight)
            answer = attention(query, tokens.tokens, tokens.tokens, key_valid=tokens.valid, bias=bias, **levels)
            return jnp.sum(jnp.sin(answer)), answer

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return make_step, state


@pytest.mark.parametrize("large", [0, 2**20])
def test_modulation_goes_through_every_implementation(large, monkeypatch):
    """As a bias that queries, heads and levels have, whose gradient returns. (cuDNN takes no bias: it gets blocks.)"""
    monkeypatch.setattr(spatial_modulation, "LARGE", large)
    monkeypatch.setattr(attention_choice, "BLOCK", 6)
    monkeypatch.setattr(attention_choice, "FEWEST_QUERIES", 4)  # a block of four queries and one of two
    make_step, state = modulated()

    def run(implementation):
        return jax.device_get(make_step(implementation)(state))

    (_, answer), gradients = run("xla")
    for part in (gradients[0].scale, gradients[0].offset, gradients[0].selection):
        assert np.abs(part.kernel.get_value()).max() > 1e-3
    (_, in_blocks), block_gradients = run("chunked")
    np.testing.assert_allclose(in_blocks, answer, atol=2e-5)
    for ours, plain in zip(jax.tree.leaves(block_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)
    program = make_step("flash").trace(state).lower(lowering_platforms=("tpu",)).as_text()
    kernels = collections.Counter(re.findall(r'kernel_name = "(\w+)"', program))
    assert kernels["query_kernel"] == kernels["key_kernel"] == len(SIZES)  # the two backward passes of each level
    assert kernels["forward_kernel"] >= len(SIZES)  # jax 0.10.2 writes, and XLA drops, some whose result nobody reads

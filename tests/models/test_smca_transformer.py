"""SMCA's encoder of attention: who attends to whom, and with whose weights."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.smca_transformer import AttentionEncoder, LevelEncoderLayer, Tokens
from deperceiver_jax.models.transformer import EncoderLayer

SIZES = ((2, 3), (1, 2))
LEVEL = np.array([0] * 6 + [1] * 2)


def make_tokens():
    rng = np.random.default_rng(0)
    content, position = (jnp.asarray(rng.standard_normal((2, 8, 8)), jnp.float32) for _ in range(2))
    valid = jnp.ones((2, 8), bool).at[1, 5].set(False)
    return Tokens(content, position, valid, SIZES, (16, 32))


def encoder(layout, **sharing):
    sharing = {"share_attention": True, "share_mlp": True, **sharing}
    return AttentionEncoder(
        8,
        num_levels=2,
        layout=layout,
        num_heads=2,
        mlp_dim=16,
        dropout=0.0,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
        **sharing,
    )


@pytest.mark.parametrize(
    "layout, share", [(layout, share) for layout in (("intra",), ("multi",)) for share in (True, False)]
)
def test_intra_stays_within_its_level(layout, share):
    tokens = make_tokens()
    encode = encoder(layout, share_attention=share, share_mlp=share)
    before = encode(tokens).content
    for level in (0, 1):
        changed = tokens.content + 3.0 * (LEVEL == level)[None, :, None]
        difference = np.abs(encode(tokens._replace(content=changed)).content - before).max(axis=(0, 2))
        assert difference[LEVEL == level].min() > 1e-3
        assert (difference[LEVEL != level].max() > 1e-4) == (layout == ("multi",))


def test_padding_is_no_key():
    tokens = make_tokens()
    for layout in (("intra", "intra"), ("multi", "intra")):
        encode = encoder(layout)
        changed = tokens._replace(content=tokens.content.at[1, 5].add(5.0))
        difference = np.abs(encode(changed).content - encode(tokens).content).max(axis=-1)
        assert difference[1, 5] > 1e-3 and not np.delete(difference[1], 5).any() and not difference[0].any()


def test_layers_of_a_layout_come_in_order():
    """A stack of five, applied one by one."""
    tokens = make_tokens()
    layout = ("intra", "intra", "multi", "intra", "intra")
    encode = encoder(layout)
    x = tokens.content
    for i, kind in enumerate(layout):
        x = encode.layers.layer(i)(x, tokens.position, tokens.valid, tokens.lengths, kind == "multi")
    np.testing.assert_allclose(encode(tokens).content, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend_across", [False, True])
def test_separate_weights_that_are_equal_are_shared_ones(attend_across):
    """And a layer whose weights all levels share is DETR's."""
    tokens = make_tokens()
    sizes = dict(num_levels=2, mlp_dim=16, dropout=0.0, dtype=jnp.float32)
    shared = LevelEncoderLayer(8, 2, share_attention=True, share_mlp=True, rngs=nnx.Rngs(0), **sizes)
    apart = LevelEncoderLayer(8, 2, share_attention=False, share_mlp=False, rngs=nnx.Rngs(1), **sizes)
    detr = EncoderLayer(8, 2, mlp_dim=16, dropout=0.0, pre_norm=False, dtype=jnp.float32, rngs=nnx.Rngs(2))
    for level in (0, 1):
        nnx.update(apart.attentions[level], nnx.state(shared.attentions[0]))
        nnx.update(apart.mlps[level], nnx.state(shared.mlps[0]))
    nnx.update(detr.attention, nnx.state(shared.attentions[0]))
    nnx.update(detr.mlp, nnx.state(shared.mlps[0]))
    constant = (tokens.position, tokens.valid, tokens.lengths, attend_across)
    answer = shared(tokens.content, *constant)
    np.testing.assert_allclose(apart(tokens.content, *constant), answer, atol=1e-5)
    if attend_across:
        expected = detr(tokens.content, tokens.position, tokens.valid)
    else:
        ends = list(itertools.accumulate(tokens.lengths))
        parts = [slice(end - length, end) for end, length in zip(ends, tokens.lengths, strict=True)]
        arrays = (tokens.content, tokens.position, tokens.valid)
        expected = jnp.concatenate([detr(*(a[:, part] for a in arrays)) for part in parts], axis=1)
    np.testing.assert_allclose(answer, expected, atol=1e-5)

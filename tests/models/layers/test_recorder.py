"""Records of attention: they are what was applied, under the name of the layer, and only while somebody records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deperceiver_jax.models.attention.deformable import MultiScaleDeformableAttention
from deperceiver_jax.models.attention.multi_head import MultiHeadAttention
from deperceiver_jax.models.deperceiver.perceiver_io import EncoderFields, PerceiverEncoder
from deperceiver_jax.models.detr.transformer import TransformerDecoder
from deperceiver_jax.models.layers.level_sampling import sample_levels
from deperceiver_jax.models.layers.recorder import is_recording, record_attention
from tests.drawn_arrays import FLOAT32, answer_of, level_tokens


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VALID = np.arange(7)[None] < np.array([[7], [5]])
SHARES = np.exp(normal(2, 2, 3, 2))
CASES = {
    "plain": {},
    "padding": {"key_valid": VALID},
    "bias": {"key_valid": VALID, "bias": normal(1, 2, 4, 3, 7)},
    "shared bias": {"bias": normal(1, 2, 1, 3, 7)},
    "segments": {"key_valid": VALID, "segments": (4, 3)},
    "weighted": {
        "bias": normal(1, 2, 4, 3, 7),
        "segments": (4, 3),
        "segment_weight": SHARES / SHARES.sum(axis=-1, keepdims=True),
    },
}


@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
def test_probabilities_times_values_are_the_output(how):
    attention = MultiHeadAttention(16, 4, compute=FLOAT32, rngs=nnx.Rngs(0))
    query, tokens = 3 * normal(3, 2, 3, 16), 3 * normal(4, 2, 7, 16)

    @jax.jit
    def attend():
        with record_attention(attention) as records:
            output = attention(query, tokens, tokens, **how)
        (record,) = records
        value = attention.value(tokens).reshape(2, 7, 4, 4)
        again = attention.out(jnp.einsum("bhqk,bkhd->bqhd", record.probability, value).reshape(2, 3, 16))
        return output, again, attention(query, tokens, tokens, **how), record

    output, again, unrecorded, record = jax.device_get(attend())
    np.testing.assert_allclose(output, again, atol=1e-5)
    np.testing.assert_array_equal(output, unrecorded)
    segments = how["segments"] if "segments" in how else (7,)
    assert record.segments == segments
    for i, part in enumerate(np.split(record.probability, np.cumsum(segments)[:-1], axis=-1)):
        total = np.broadcast_to(record.segment_weight[:, None, :, i], (2, 4, 3))
        np.testing.assert_allclose(part.sum(axis=-1), total, atol=1e-6)
    assert ("key_valid" in how) == (np.abs(record.probability[1, ..., 5:]).max() == 0)
    if "bias" in how:
        np.testing.assert_array_equal(record.bias, how["bias"])
    else:
        assert record.bias is None


def test_points_and_weights_are_what_was_read():
    sizes = [(3, 4), (2, 2)]
    attention = MultiScaleDeformableAttention(
        16, num_heads=4, num_levels=2, num_points=3, sampling="gather", compute=FLOAT32, rngs=nnx.Rngs(0)
    )
    attention.attention_weights.kernel.set_value(normal(0, 16, 24))
    query, tokens, valid = normal(1, 2, 5, 16), normal(2, 2, 16, 16), np.ones((2, 16), bool)
    reference, scale = 1 / (1 + np.exp(-normal(3, 2, 5, 2, 2))), np.full((2, 5, 2, 2), 0.1, np.float32)

    @jax.jit
    def attend():
        with record_attention(attention) as records:
            output = attention(query, reference, scale, tokens, valid, sizes)
        (record,) = records
        value = attention.value(tokens).reshape(2, 16, 4, 4)
        read = sample_levels(value, sizes, record.location, record.weight, sampling="gather")
        return output, attention.out(read.reshape(2, 5, 16)), record

    output, again, record = jax.device_get(attend())
    np.testing.assert_array_equal(record.reference, reference)
    np.testing.assert_allclose(record.weight.sum(axis=(3, 4)), 1, atol=1e-6)
    np.testing.assert_allclose(output, again, atol=1e-6)


@pytest.fixture(scope="module")
def decoder():
    return TransformerDecoder(
        16,
        5,
        num_layers=3,
        num_heads=2,
        mlp_dim=8,
        query_position="attention",
        pre_norm=False,
        dropout=0.1,
        compute=FLOAT32,
        rngs=nnx.Rngs(0),
    )


ARGUMENTS = normal(1, 2, 7, 16), normal(2, 2, 7, 16), VALID


@pytest.mark.parametrize("rematerialize", [False, True])
def test_layers_of_a_stack_by_name_and_nothing_else_changes(decoder, rematerialize):
    decoder.layers.rematerialize = rematerialize

    def forward(decoder, arguments):
        with record_attention(decoder, "cross_attention") as records:
            decoded = decoder(*arguments)
        return decoded, records

    decoded, records = jax.device_get(jax.jit(forward)(decoder, ARGUMENTS))
    assert [record.name for record in records] == [f"layers.{i}.cross_attention" for i in range(3)]
    np.testing.assert_allclose(decoded, answer_of(decoder, *ARGUMENTS), atol=1e-5)
    assert len({float(record.probability[0, 0, 0, 0]) for record in records}) == 3  # each its own
    decoder.layers.rematerialize = False


def test_blocks_that_share_their_layers_are_recorded_each_time():
    fields = EncoderFields(
        num_latents=3,
        latent_dim=8,
        latent_init="normal",
        latent_scale=1.0,
        num_blocks=3,
        layers_per_block=1,
        share_blocks=True,
        num_cross_attentions=1,
        cross_heads=1,
        self_heads=2,
        mlp_ratio=1.0,
        gated_mlp=False,
        anchors=False,
        anchor_width=0.1,
    )
    encoder = PerceiverEncoder(16, fields, dropout=0.0, compute=FLOAT32, rngs=nnx.Rngs(0))
    image = level_tokens([VALID[:, None]]).replace(tokens=ARGUMENTS[0])

    @jax.jit
    def encode(image):
        with record_attention(encoder) as records:
            return encoder(image), records

    latents, records = encode(image)
    assert [record.name for record in records] == ["cross_attentions.0.attention"] + 3 * ["blocks.0.attention"]
    np.testing.assert_allclose(latents, answer_of(encoder, image), atol=1e-5)


def test_off_before_after_and_when_it_breaks(decoder):
    assert not is_recording()
    with pytest.raises(RuntimeError, match="broken"), record_attention(decoder) as records:
        assert is_recording()
        raise RuntimeError("broken")
    assert not is_recording()
    jax.eval_shape(lambda: decoder(*ARGUMENTS))
    assert records == []

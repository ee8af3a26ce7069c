"""The names of mooey5775/DePerceiver."""

from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.weights.name_rules import POINTWISE, ROW, NameRules, Rule
from deperceiver_jax.weights.tables.parts import NOT_PARAMETERS, linear_rules, norm_rules, resnet_rules


def _perceiver_attention_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    names = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "projection"))
    return [rule for a, b in names for rule in linear_rules(f"{ours}/{a}", f"{theirs}.{b}", first_layer)]


def _perceiver_layer_rules(ours: str, theirs: str, norms: dict[str, str], first_layer=None) -> list[Rule]:
    """Attention, MLP and norms of one layer of Perceiver IO; `norms` maps our names of the norms to theirs."""
    rules = _perceiver_attention_rules(f"{ours}/attention", f"{theirs}.attention", first_layer)
    for i, j in ((0, 0), (1, 2)):
        rules += linear_rules(f"{ours}/mlp/layers/{i}", f"{theirs}.mlp.mlp.{j}", first_layer)
    for a, b in {**norms, "mlp_norm": "qkv_layer_norm"}.items():
        rules += norm_rules(f"{ours}/{a}", f"{theirs}.{b}", first_layer)
    return rules


def deperceiver_rules(model: ConfigDict) -> NameRules:
    """The released DePerceiver's names; `model` is config.model.

    The published decoder (one cross-attention) and the multi-layer one are different classes there, and so are the
    input projections of one and of several strides.
    """
    cross_norms = {"query_norm": "q_layer_norm", "token_norm": "kv_layer_norm"}
    decoder = model.decoder
    if decoder.num_layers == 0:
        raise UserError("config.model.decoder.num_layers is 0; the published DePerceiver has a decoder, and its files.")
    single = decoder.num_layers == 1 and not decoder.self_attention and not decoder.final_norm
    their_decoder = "perceiver.decoder" if single else "perceiver.decoder.layers.{layer}"
    level = "" if len(model.strides) == 1 else r".\1"
    rules = [
        *resnet_rules("backbone/", "backbone.backbone.body."),
        *linear_rules(r"levels/projections/(\d)", f"input_proj{level}", layout=POINTWISE),
        Rule("levels/level_embedding", "scale_embedding.{layer}.weight", ROW, 0),
        Rule("encoder/latents", "perceiver.encoder.latents"),
        *_perceiver_layer_rules("encoder/cross_attentions/0", "perceiver.encoder.cross_attn", cross_norms),
        *_perceiver_layer_rules(
            "encoder/blocks/layers", "perceiver.encoder.self_attention_block.{layer}", {"norm": "layer_norm"}, 0
        ),
        Rule("decoder/query_position", "query_embed.weight"),
        *_perceiver_layer_rules(
            "decoder/layers/layers/cross_attention", f"{their_decoder}.cross_attention", cross_norms, 0
        ),
        *_perceiver_attention_rules(
            "decoder/layers/layers/self_attention", f"{their_decoder}.partial_self_attention", 0
        ),
        *norm_rules("decoder/layers/layers/self_attention_norm", f"{their_decoder}.norm1", 0),
        *norm_rules("decoder/norm", "perceiver.decoder.norm"),
        *linear_rules("heads/class_head/linear", "class_embed"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), (*NOT_PARAMETERS, r"^criterion\.empty_weight$"))

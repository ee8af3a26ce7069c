"""The names of facebookresearch/detr."""

from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import POINTWISE, NameRules, Rule
from deperceiver_jax.weights.tables.parts import (
    NOT_PARAMETERS,
    linear_rules,
    norm_rules,
    resnet_rules,
    torch_attention_rules,
)


def _transformer_rules() -> list[Rule]:
    """DETR's encoder and decoder; the norms are numbered in the order of their sublayers."""
    rules = []
    for half, attentions in (
        ("encoder", {"attention": "self_attn"}),
        ("decoder", {"self_attention": "self_attn", "cross_attention": "multihead_attn"}),
    ):
        ours, theirs = f"{half}/layers/layers", f"transformer.{half}.layers.{{layer}}"
        for number, (a, b) in enumerate(attentions.items(), start=1):
            rules += torch_attention_rules(f"{ours}/{a}", f"{theirs}.{b}", 0)
            rules += norm_rules(f"{ours}/{a}_norm", f"{theirs}.norm{number}", 0)
        rules += norm_rules(f"{ours}/mlp_norm", f"{theirs}.norm{len(attentions) + 1}", 0)
        for layer in (0, 1):
            rules += linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.linear{layer + 1}", 0)
        rules += norm_rules(f"{half}/norm", f"transformer.{half}.norm")
    return rules


def detr_rules(model: ConfigDict) -> NameRules:
    """The released DETR's names, the same for every variant."""
    del model
    rules = [
        *resnet_rules("backbone/", "backbone.0.body."),
        Rule("position/column", "backbone.1.col_embed.weight"),
        Rule("position/row", "backbone.1.row_embed.weight"),
        Rule("projection/kernel", "input_proj.weight", POINTWISE),
        Rule("projection/bias", "input_proj.bias"),
        *_transformer_rules(),
        Rule("decoder/query_position", "query_embed.weight"),
        *linear_rules("heads/class_head/linear", "class_embed"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), NOT_PARAMETERS)

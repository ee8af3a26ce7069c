"""The names of facebookresearch/detr."""

from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import POINTWISE, NameRules, Rule
from deperceiver_jax.weights.tables.parts import (
    NOT_PARAMETERS,
    detr_decoder_rules,
    linear_rules,
    norm_rules,
    resnet_rules,
    torch_layer_rules,
)


def detr_rules(model: ConfigDict) -> NameRules:
    """The released DETR's names, the same for every variant."""
    del model
    rules = [
        *resnet_rules("backbone/", "backbone.0.body."),
        Rule("position/column", "backbone.1.col_embed.weight"),
        Rule("position/row", "backbone.1.row_embed.weight"),
        *linear_rules("projection", "input_proj", layout=POINTWISE),
        *torch_layer_rules("encoder", {"attention": "self_attn"}, ("attention", "mlp")),
        *norm_rules("encoder/norm", "transformer.encoder.norm"),
        *detr_decoder_rules(),
        Rule("decoder/query_position", "query_embed.weight"),
        *linear_rules("heads/class_head/linear", "class_embed"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), NOT_PARAMETERS)

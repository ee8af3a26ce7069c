"""The names of gaopengcuhk/SMCA-DETR: of its single-scale model and of the multi-scale one in the archive inside."""

from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import CONV, POINTWISE, NameRules, Rule
from deperceiver_jax.weights.tables.parts import (
    NOT_PARAMETERS,
    detr_decoder_rules,
    linear_rules,
    mlp_rules,
    norm_rules,
    resnet_rules,
    torch_attention_rules,
)


def _decoder_rules() -> list[Rule]:
    """The first layer alone estimates centres, from where all others take them."""
    ours, theirs = "decoder/layers/layers", "transformer.decoder.layers.{layer}"
    rules = detr_decoder_rules() + norm_rules(f"{ours}/modulation/norm", f"{theirs}.norm4", 0)
    for number, part in enumerate(("offset", "scale", "selection"), start=2):
        rules += linear_rules(f"{ours}/modulation/{part}", f"{theirs}.point{number}", 0)
    return [
        *rules,
        *linear_rules(r"decoder/center/layers/(\d)", r"transformer.decoder.layers.0.point1.layers.\1"),
        Rule("decoder/query_position", "query_embed.weight"),
    ]


def _attention_encoder_rules() -> list[Rule]:
    """Of a single level; no other was released."""
    ours, theirs = "encoder/layers/layers", "transformer.encoder.layers.{layer}"
    return [
        *torch_attention_rules(f"{ours}/attentions/0", f"{theirs}.self_attn", 0),
        *norm_rules(f"{ours}/attention_norm", f"{theirs}.norm1", 0),
        *mlp_rules(f"{ours}/mlps/0", theirs),
        *norm_rules(f"{ours}/mlp_norm", f"{theirs}.norm2", 0),
        *linear_rules("levels/projections/0", "input_proj", layout=POINTWISE),
    ]


def _convolution_encoder_rules(share_crossings: bool) -> list[Rule]:
    """Of strides 8 to 64. The released code's names of projections are the widths of a ResNet of bottlenecks."""
    ours, theirs = "encoder/layers/layers", "transformer.encoder.layers.{layer}"
    rules = [
        *linear_rules(f"{ours}/before", f"{theirs}.conv_1", 0, POINTWISE),
        *linear_rules(f"{ours}/after", f"{theirs}.conv_2", 0, POINTWISE),
        *norm_rules(f"{ours}/convolution_norm", f"{theirs}.norm1", 0),
        *mlp_rules(f"{ours}/mlp", theirs),
        *norm_rules(f"{ours}/mlp_norm", f"{theirs}.norm2", 0),
        *linear_rules("encoder/reduce", "transformer.conv", layout=CONV),
        *linear_rules("levels/projections/3", "input_proj_2048_3", layout=CONV),
        Rule("level_embedding", "transformer.level_embed"),
    ]
    for level, stride in enumerate((8, 16, 32, 64)):
        rules += linear_rules(f"{ours}/within/{level}", f"{theirs}.self_attn_{stride}", 0, CONV)
    for level, width in enumerate((512, 1024, 2048)):
        rules += linear_rules(f"levels/projections/{level}", f"input_proj_{width}", layout=POINTWISE)
        number = "" if share_crossings else f"_{level + 1}"
        if level == 0 or not share_crossings:
            rules += linear_rules(f"{ours}/down/{level}", f"{theirs}.high_to_low{number}", 0, CONV)
            rules += linear_rules(f"{ours}/up/{level}", f"{theirs}.low_to_high{number}", 0, CONV)
    return rules


def smca_rules(model: ConfigDict) -> NameRules:
    """The released names. The paper's multi-scale encoder was never released and has none."""
    if model.encoder.kind == "convolution":
        encoder = _convolution_encoder_rules(model.encoder.share_crossings)
    else:
        encoder = _attention_encoder_rules()
    rules = [
        *resnet_rules("backbone/", "backbone.0.body."),
        *encoder,
        *_decoder_rules(),
        *linear_rules("heads/class_head/linear", "class_embed"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), NOT_PARAMETERS)

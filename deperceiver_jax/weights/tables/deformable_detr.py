"""The names of fundamentalvision/Deformable-DETR."""

from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import CONV, POINTWISE, NameRules, Rule
from deperceiver_jax.weights.tables.parts import (
    NOT_PARAMETERS,
    linear_rules,
    norm_rules,
    resnet_rules,
    torch_layer_rules,
)


def deformable_attention_rules(ours: str, theirs: str) -> list[Rule]:
    names = {"value": "value_proj", "out": "output_proj"}
    layers = ("value", "out", "sampling_offsets", "attention_weights")
    return [r for a in layers for r in linear_rules(f"{ours}/{a}", f"{theirs}.{names.get(a, a)}", 0)]


def level_rules(model: ConfigDict, theirs: str) -> list[Rule]:
    """The projection and norm of every level; those of the backbone's features are 1x1 convolutions."""
    rules = norm_rules(r"levels/norms/(\d+)", rf"{theirs}\1.1")
    for level in range(len(model.strides) + model.extra_levels):
        layout = POINTWISE if level < len(model.strides) else CONV
        rules += linear_rules(f"levels/projections/{level}", f"{theirs}{level}.0", layout=layout)
    return rules


def reference_rules(theirs: str) -> list[Rule]:
    """Where queries come from: the layer that places learned ones, or those that turn proposals into queries."""
    return [
        *linear_rules("reference_points", f"{theirs}reference_points"),
        *linear_rules("proposals/output", f"{theirs}enc_output"),
        *norm_rules("proposals/output_norm", f"{theirs}enc_output_norm"),
        *linear_rules("proposals/query", f"{theirs}pos_trans"),
        *norm_rules("proposals/query_norm", f"{theirs}pos_trans_norm"),
    ]


def head_rules(model: ConfigDict) -> list[Rule]:
    """Shared heads have the first layer's name; the proposals' come after those of all decoder layers."""

    def heads(ours: str, number: str, first_layer=None) -> list[Rule]:
        return [
            *linear_rules(f"{ours}class_head/linear", f"class_embed.{number}", first_layer),
            *linear_rules(rf"{ours}box_head/mlp/layers/(\d)", rf"bbox_embed.{number}.layers.\1", first_layer),
        ]

    return [
        *heads("decoder/heads/", "0"),
        *heads("decoder/layers/layers/heads/", "{layer}", 0),
        *heads("proposals/", str(model.decoder.num_layers)),
    ]


def head_copies(model: ConfigDict, decoder: str) -> tuple[tuple[str, str], ...]:
    """The state dict repeats the heads: those that all layers share, once a layer; those of refining layers, and of the
    proposals, under the `decoder` too."""
    if model.refine:
        heads = ("bbox_embed", "class_embed") if model.two_stage else ("bbox_embed",)
        return ((rf"({'|'.join(heads)})\.(.*)", rf"{decoder}.\1.\2"),)
    layers = range(1, model.decoder.num_layers)
    return tuple((r"(class_embed|bbox_embed)\.0\.(.*)", rf"\1.{layer}.\2") for layer in layers)


def deformable_detr_rules(model: ConfigDict) -> NameRules:
    """The released Deformable DETR's names. Files of the README's first links hold counts of operations as well."""
    rules = [
        *resnet_rules("backbone/", "backbone.0.body."),
        *level_rules(model, "input_proj."),
        Rule("level_embedding", "transformer.level_embed"),
        *torch_layer_rules("encoder", {}, ("attention", "mlp")),
        *deformable_attention_rules("encoder/layers/layers/attention", "transformer.encoder.layers.{layer}.self_attn"),
        # The decoder attends to itself first, but its norms are numbered as if it did so second.
        *torch_layer_rules("decoder", {"self_attention": "self_attn"}, ("cross_attention", "self_attention", "mlp")),
        *deformable_attention_rules(
            "decoder/layers/layers/cross_attention", "transformer.decoder.layers.{layer}.cross_attn"
        ),
        Rule("queries", "query_embed.weight"),
        *reference_rules("transformer."),
        *head_rules(model),
    ]
    ignored = (*NOT_PARAMETERS, r"(^|\.)total_(params|ops)$")
    return NameRules(tuple(rules), ignored, head_copies(model, "transformer.decoder"))

"""The names of transformers."""

from collections.abc import Callable

from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import CONV, POINTWISE, SAME, NameRules, Rule
from deperceiver_jax.weights.tables.deformable_detr import (
    deformable_attention_rules,
    head_copies,
    head_rules,
    level_rules,
    reference_rules,
)
from deperceiver_jax.weights.tables.parts import BATCH_NORM, NOT_PARAMETERS, linear_rules, norm_rules


def _attention_rules(ours: str, theirs: str) -> list[Rule]:
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return [r for a, b in parts.items() for r in linear_rules(f"{ours}/{a}", f"{theirs}.{b}", 0)]


def _transformer_rules(deformable: bool) -> list[Rule]:
    """Encoder and decoder; with `deformable`, all attentions are but the one among the queries."""
    rules = []
    for half, attentions in (
        ("encoder", {"attention": "self_attn"}),
        ("decoder", {"self_attention": "self_attn", "cross_attention": "encoder_attn"}),
    ):
        ours, theirs = f"{half}/layers/layers", f"model.{half}.layers.{{layer}}"
        for a, b in attentions.items():
            attention_rules = deformable_attention_rules if deformable and a != "self_attention" else _attention_rules
            rules += attention_rules(f"{ours}/{a}", f"{theirs}.{b}")
            rules += norm_rules(f"{ours}/{a}_norm", f"{theirs}.{b}_layer_norm", 0)
        rules += norm_rules(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm", 0)
        for layer in (0, 1):
            rules += linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.fc{layer + 1}", 0)
    return rules


def hugging_face_resnet_rules(ours: str, theirs: str) -> list[Rule]:
    """The names of a ResNet of three-convolution blocks in transformers, where it is not timm's."""
    stem = f"{theirs}embedder.embedder."
    rules = [Rule(f"{ours}stem_conv/kernel", f"{stem}convolution.weight", CONV)]
    rules += [Rule(f"{ours}stem_norm/{a}", f"{stem}normalization.{b}") for a, b in BATCH_NORM]
    for stage in range(4):
        layers = f"{theirs}encoder.stages.{stage}.layers."
        for blocks, number, first_layer in (("first", "0", None), ("rest/layers", "{layer}", 1)):
            for conv in range(3):
                path, name = f"{ours}stages/{stage}/{blocks}/", f"{layers}{number}.layer.{conv}."
                rules.append(Rule(f"{path}conv{conv + 1}/kernel", f"{name}convolution.weight", CONV, first_layer))
                rules += [
                    Rule(f"{path}norm{conv + 1}/{a}", f"{name}normalization.{b}", SAME, first_layer)
                    for a, b in BATCH_NORM
                ]
        path, name = f"{ours}stages/{stage}/first/", f"{layers}0.shortcut."
        rules.append(Rule(f"{path}shortcut_conv/kernel", f"{name}convolution.weight", CONV))
        rules += [Rule(f"{path}shortcut_norm/{a}", f"{name}normalization.{b}") for a, b in BATCH_NORM]
    return rules


def hugging_face_detr_rules(resnet: Callable[[str, str], list[Rule]]) -> NameRules:
    """DETR's names in transformers (DetrForObjectDetection), with one of the two backbones it can have."""
    rules = [
        *resnet("backbone/", "model.backbone.conv_encoder.model."),
        Rule("position/column", "model.backbone.position_embedding.column_embeddings.weight"),
        Rule("position/row", "model.backbone.position_embedding.row_embeddings.weight"),
        *linear_rules("projection", "model.input_projection", layout=POINTWISE),
        *_transformer_rules(deformable=False),
        *norm_rules("decoder/norm", "model.decoder.layernorm"),  # the only one: there is no pre-norm
        Rule("decoder/query_position", "model.query_position_embeddings.weight"),
        *linear_rules("heads/class_head/linear", "class_labels_classifier"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_predictor.layers.\1"),
    ]
    # Version 5 keeps the tables of learned positions outside of the backbone.
    copies = ((r"model\.backbone\.(position_embedding\..*)", r"model.\1"),)
    return NameRules(tuple(rules), NOT_PARAMETERS, copies)


def hugging_face_deformable_detr_rules(model: ConfigDict, resnet: Callable[[str, str], list[Rule]]) -> NameRules:
    """Deformable DETR's names in transformers (DeformableDetrForObjectDetection), with one of its two backbones.

    They are those of its files, of the first as of the newest; in memory the newest calls some modules otherwise. With
    refinement but one stage, the newest files hold one class head for all layers, and the published ones one a layer.
    """
    rules = [
        *resnet("backbone/", "model.backbone.conv_encoder.model."),
        *level_rules(model, "model.input_proj."),
        Rule("level_embedding", "model.level_embed"),
        *_transformer_rules(deformable=True),
        Rule("queries", "model.query_position_embeddings.weight"),
        *reference_rules("model."),
        *head_rules(model),
    ]
    tied = ((r"class_embed\.\d+\.(.*)", r"class_embed.0.\1"),) if model.refine and not model.two_stage else ()
    return NameRules(tuple(rules), NOT_PARAMETERS, head_copies(model, "model.decoder"), tied)

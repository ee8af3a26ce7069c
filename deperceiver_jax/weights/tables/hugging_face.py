"""The names of transformers."""

from collections.abc import Callable

from deperceiver_jax.weights.name_rules import CONV, POINTWISE, SAME, NameRules, Rule
from deperceiver_jax.weights.tables.parts import BATCH_NORM, NOT_PARAMETERS, linear_rules, norm_rules


def _hugging_face_transformer_rules() -> list[Rule]:
    """DETR's encoder and decoder in transformers, which has no pre-norm and hence no norm after the encoder."""
    rules = []
    for half, attentions in (
        ("encoder", {"attention": "self_attn"}),
        ("decoder", {"self_attention": "self_attn", "cross_attention": "encoder_attn"}),
    ):
        ours, theirs = f"{half}/layers/layers", f"model.{half}.layers.{{layer}}"
        for a, b in attentions.items():
            for part in ("query", "key", "value"):
                rules += linear_rules(f"{ours}/{a}/{part}", f"{theirs}.{b}.{part[0]}_proj", 0)
            rules += linear_rules(f"{ours}/{a}/out", f"{theirs}.{b}.out_proj", 0)
            rules += norm_rules(f"{ours}/{a}_norm", f"{theirs}.{b}_layer_norm", 0)
        rules += norm_rules(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm", 0)
        for layer in (0, 1):
            rules += linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.fc{layer + 1}", 0)
    return [*rules, *norm_rules("decoder/norm", "model.decoder.layernorm")]


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
        Rule("projection/kernel", "model.input_projection.weight", POINTWISE),
        Rule("projection/bias", "model.input_projection.bias"),
        *_hugging_face_transformer_rules(),
        Rule("decoder/query_position", "model.query_position_embeddings.weight"),
        *linear_rules("heads/class_head/linear", "class_labels_classifier"),
        *linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_predictor.layers.\1"),
    ]
    return NameRules(tuple(rules), NOT_PARAMETERS)

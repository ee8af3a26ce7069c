"""The names of what several programs share: ResNets, linear layers, norms, torch.nn.MultiheadAttention."""

from collections.abc import Mapping, Sequence

from deperceiver_jax.weights.name_rules import CONV, LINEAR, SAME, Layout, Rule

NORM = (("scale", "weight"), ("bias", "bias"))
BATCH_NORM = (*NORM, ("mean", "running_mean"), ("var", "running_var"))
NOT_PARAMETERS = (r"(^|\.)num_batches_tracked$",)


def resnet_rules(ours: str = "", theirs: str = "") -> list[Rule]:
    """torchvision's and timm's names of a ResNet. `ours` and `theirs` come before every path and name."""
    rules = [Rule(f"{ours}stem_conv/kernel", f"{theirs}conv1.weight", CONV)]
    rules += [Rule(f"{ours}stem_norm/{a}", f"{theirs}bn1.{b}") for a, b in BATCH_NORM]
    for stage in range(4):
        for blocks, number, first_layer in (("first", "0", None), ("rest/layers", "{layer}", 1)):
            path, name = f"{ours}stages/{stage}/{blocks}/", f"{theirs}layer{stage + 1}.{number}."
            rules.append(Rule(rf"{path}conv(\d)/kernel", rf"{name}conv\1.weight", CONV, first_layer))
            rules += [Rule(rf"{path}norm(\d)/{a}", rf"{name}bn\1.{b}", SAME, first_layer) for a, b in BATCH_NORM]
        path, name = f"{ours}stages/{stage}/first/", f"{theirs}layer{stage + 1}.0.downsample."
        rules.append(Rule(f"{path}shortcut_conv/kernel", f"{name}0.weight", CONV))
        rules += [Rule(f"{path}shortcut_norm/{a}", f"{name}1.{b}") for a, b in BATCH_NORM]
    return rules


def linear_rules(ours: str, theirs: str, first_layer=None, layout: Layout = LINEAR) -> list[Rule]:
    """A kernel, of a convolution with another `layout`, and a bias."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", layout, first_layer)
    return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias", SAME, first_layer)]


def norm_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    return [Rule(f"{ours}/{a}", f"{theirs}.{b}", SAME, first_layer) for a, b in NORM]


def torch_attention_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    """torch.nn.MultiheadAttention: the three input layers are one array, the output layer is a linear layer."""
    rules = linear_rules(f"{ours}/out", f"{theirs}.out_proj", first_layer)
    for third, part in enumerate(("query", "key", "value")):
        rules.append(Rule(f"{ours}/{part}/kernel", f"{theirs}.in_proj_weight", LINEAR, first_layer, third))
        rules.append(Rule(f"{ours}/{part}/bias", f"{theirs}.in_proj_bias", SAME, first_layer, third))
    return rules


def mlp_rules(ours: str, theirs: str) -> list[Rule]:
    """The MLP of torch.nn.Transformer's layers."""
    return [r for layer in (0, 1) for r in linear_rules(f"{ours}/layers/{layer}", f"{theirs}.linear{layer + 1}", 0)]


def torch_layer_rules(half: str, attentions: Mapping[str, str], sublayers: Sequence[str]) -> list[Rule]:
    """Layers of torch.nn.Transformer: {our attention: its name}, and our sublayers in the order of their norms."""
    ours, theirs = f"{half}/layers/layers", f"transformer.{half}.layers.{{layer}}"
    rules = mlp_rules(f"{ours}/mlp", theirs)
    for a, b in attentions.items():
        rules += torch_attention_rules(f"{ours}/{a}", f"{theirs}.{b}", 0)
    for number, sublayer in enumerate(sublayers, start=1):
        rules += norm_rules(f"{ours}/{sublayer}_norm", f"{theirs}.norm{number}", 0)
    return rules


def detr_decoder_rules() -> list[Rule]:
    """The layers of DETR's decoder, and the norm behind them."""
    attentions = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
    layers = torch_layer_rules("decoder", attentions, (*attentions, "mlp"))
    return [*layers, *norm_rules("decoder/norm", "transformer.decoder.norm")]

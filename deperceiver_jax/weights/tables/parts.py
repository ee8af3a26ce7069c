"""The names of what several programs share: ResNets, linear layers, norms, torch.nn.MultiheadAttention."""

from deperceiver_jax.weights.name_rules import CONV, LINEAR, SAME, Rule

NORM = (("scale", "weight"), ("bias", "bias"))
BATCH_NORM = (*NORM, ("mean", "running_mean"), ("var", "running_var"))
KERNEL_AND_BIAS = (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
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


def linear_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    return [Rule(f"{ours}/{a}", f"{theirs}.{b}", layout, first_layer) for a, b, layout in KERNEL_AND_BIAS]


def norm_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    return [Rule(f"{ours}/{a}", f"{theirs}.{b}", SAME, first_layer) for a, b in NORM]


def torch_attention_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    """torch.nn.MultiheadAttention: the three input layers are one array, the output layer is a linear layer."""
    rules = linear_rules(f"{ours}/out", f"{theirs}.out_proj", first_layer)
    for third, part in enumerate(("query", "key", "value")):
        rules.append(Rule(f"{ours}/{part}/kernel", f"{theirs}.in_proj_weight", LINEAR, first_layer, third))
        rules.append(Rule(f"{ours}/{part}/bias", f"{theirs}.in_proj_bias", SAME, first_layer, third))
    return rules

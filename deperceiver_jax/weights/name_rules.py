"""Which official name is which of our parameters, and how their layouts differ: one table per family.

Ours are paths like `encoder/blocks/layers/mlp/layers/0/kernel`, whose repeated layers share one array with a leading
layer axis; theirs are PyTorch's, one array a layer. A table is used in both directions and never partly: a parameter
without a name and a name without a parameter are errors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.weights.torch_checkpoint import read_state_dict


class Layout(NamedTuple):
    """How an array of theirs becomes one of ours, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(lambda a: a.T, lambda a: a.T)  # [out, in] <-> [in, out]
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Layout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])  # 1x1 convolution <-> linear layer
ROW = Layout(lambda a: a[0], lambda a: a[None])  # a table of one row <-> a vector


class Rule(NamedTuple):
    """One line of a table: our path (a regular expression), their name, and how the arrays differ.

    The name may use the expression's groups (\\1). With `first_layer` our array is a stack of theirs: {layer} in the
    name counts from it (a name without {layer} belongs to a stack of one). With `third` ours is that third of theirs
    along its first axis: PyTorch's attention keeps query, key and value (0, 1, 2) in one array.
    """

    path: str
    name: str
    layout: Layout = SAME
    first_layer: int | None = None
    third: int | None = None

    def shape_of_theirs(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under one official name of our array of this shape."""
        layer = ours if self.first_layer is None else ours[1:]
        first, *rest = self.layout.to_theirs(np.broadcast_to(np.float32(0), layer)).shape
        return (first if self.third is None else 3 * first, *rest)

    def from_theirs(self, theirs: np.ndarray) -> np.ndarray:
        """Our array, or our layer of it."""
        return self.layout.to_ours(theirs if self.third is None else np.split(theirs, 3)[self.third])


@dataclass(frozen=True)
class NameRules:
    """A family's table, and the official names that are nobody's parameter (regular expressions).

    `copies`: (regular expression of a name, name that the official state dict has for the same array once more).
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


class LoadReport(NamedTuple):
    """What became of the names in a state dict."""

    loaded: list[str]
    ignored: list[str]


# ------------------------------------------------------------------------------------------------ both directions


def from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], rules: NameRules, *, source: str | Path
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """{our path: array} of a whole state dict, for a model whose paths have these `shapes`.

    Raises UserError, naming `source` and the parameters, for names that are missing, left over or of another shape,
    and for copies that differ from what they are copies of. Copies may be missing.
    """
    entries = _entries(shapes, rules)
    known = {name for _, _, names in entries for name in names}
    copies = copies_of(known, rules)
    ignored = [
        name
        for name in state
        if name not in known and (name in copies or any(re.search(p, name) for p in rules.ignored))
    ]
    _refuse(source, "lacks", [name for name in sorted(known) if name not in state], "which this model needs")
    leftovers = [name for name in state if name not in known and name not in set(ignored)]
    _refuse(source, "holds", leftovers, "which this model does not have")
    different = [
        copy for copy, name in copies.items() if copy in state and not np.array_equal(state[copy], state[name])
    ]
    _refuse(source, "holds", different, "which should be copies of other arrays but differ from them")

    arrays = {}
    for path, rule, names in entries:
        theirs = rule.shape_of_theirs(shapes[path])
        for name in names:
            if state[name].shape != theirs:
                raise UserError(
                    f"{name} has the shape {list(state[name].shape)} in {source} and {list(theirs)} in this model."
                )
        layers = [rule.from_theirs(state[name]) for name in names]
        arrays[path] = layers[0] if rule.first_layer is None else np.stack(layers)
    return arrays, LoadReport(sorted(known), ignored)


def to_torch(arrays: Mapping[str, np.ndarray], rules: NameRules) -> dict[str, np.ndarray]:
    """The official state dict of {our path: array}, without copies; `from_torch` gives the same arrays back."""
    parts = {}  # name: {third or None: array in their layout}
    for path, rule, names in _entries({path: np.shape(array) for path, array in arrays.items()}, rules):
        layers = [arrays[path]] if rule.first_layer is None else arrays[path]
        for name, layer in zip(names, layers, strict=True):
            parts.setdefault(name, {})[rule.third] = rule.layout.to_theirs(np.asarray(layer))
    for name, theirs in parts.items():
        if set(theirs) not in ({None}, {0, 1, 2}):
            raise ValueError(f"{name} is put together from the thirds {sorted(theirs)} only.")
    return {name: np.concatenate([theirs[third] for third in sorted(theirs)]) for name, theirs in parts.items()}


def copies_of(names: Iterable[str], rules: NameRules) -> dict[str, str]:
    """{copy: the one of `names` whose array it repeats}."""
    found = {}
    for name in names:
        for pattern, copy in rules.copies:
            if match := re.fullmatch(pattern, name):
                found[match.expand(copy)] = name
    return found


def with_copies(state: Mapping[str, np.ndarray], rules: NameRules) -> dict[str, np.ndarray]:
    """What `to_torch` gives, with the arrays that the official state dict holds more than once."""
    return {**state, **{copy: state[name] for copy, name in copies_of(state, rules).items()}}


def load_torch_state(
    module: nnx.Module, state: Mapping[str, np.ndarray], rules: NameRules, *, source: str | Path = "the state dict"
) -> LoadReport:
    """Puts a whole state dict into `module`, in the types of its parameters; a UserError leaves it as it was."""
    variables = _variables(module)
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    arrays, report = from_torch(state, shapes, rules, source=source)
    for path, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[path], variable.get_value().dtype))
    return report


def to_torch_state(module: nnx.Module, rules: NameRules) -> dict[str, np.ndarray]:
    """The official state dict of `module`, copies and all: what `load_torch_state` would load to get it."""
    arrays = {path: np.asarray(variable.get_value()) for path, variable in _variables(module).items()}
    return with_copies(to_torch(arrays, rules), rules)


def torch_shapes(module: nnx.Module, rules: NameRules) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of what `load_torch_state` needs; `module` may be abstract (`nnx.eval_shape`)."""
    zeros = {path: np.broadcast_to(np.float32(0), v.get_value().shape) for path, v in _variables(module).items()}
    return {name: array.shape for name, array in to_torch(zeros, rules).items()}


def official_names(shapes: Mapping[str, tuple[int, ...]], rules: NameRules) -> dict[str, list[str]]:
    """{our path: its official names, one a layer}, for a model whose paths have these `shapes`."""
    return {path: names for path, _, names in _entries(shapes, rules)}


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): v for path, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)}


def _entries(shapes: Mapping[str, tuple[int, ...]], rules: NameRules) -> list[tuple[str, Rule, list[str]]]:
    """(path, rule, official names) of every path; a path without a name is an error."""
    entries, homeless = [], []
    for path, shape in shapes.items():
        found = [(rule, match) for rule in rules.rules if (match := re.fullmatch(rule.path, path))]
        if len(found) > 1:
            raise ValueError(f"Several name rules fit {path}: {', '.join(rule.path for rule, _ in found)}.")
        names = []
        for rule, match in found:
            layers = 1 if rule.first_layer is None else shape[0]
            names = [match.expand(rule.name).format(layer=(rule.first_layer or 0) + i) for i in range(layers)]
        if not names or len(set(names)) < len(names):
            homeless.append(path)
        else:
            entries.append((path, found[0][0], names))
    _refuse("This model", "has", homeless, "for which the published checkpoints have no name")
    return entries


def _refuse(source, verb: str, names: list[str], why: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{source} {verb} {', '.join(names[:3])}{more}, {why}.")


# --------------------------------------------------------------------------------------------------- the tables

_NORM = (("scale", "weight"), ("bias", "bias"))
_BATCH_NORM = (*_NORM, ("mean", "running_mean"), ("var", "running_var"))
_LINEAR = (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
_NOT_PARAMETERS = (r"(^|\.)num_batches_tracked$",)


def resnet_rules(ours: str = "", theirs: str = "") -> list[Rule]:
    """torchvision's and timm's names of a ResNet. `ours` and `theirs` come before every path and name."""
    rules = [Rule(f"{ours}stem_conv/kernel", f"{theirs}conv1.weight", CONV)]
    rules += [Rule(f"{ours}stem_norm/{a}", f"{theirs}bn1.{b}") for a, b in _BATCH_NORM]
    for stage in range(4):
        for blocks, number, first_layer in (("first", "0", None), ("rest/layers", "{layer}", 1)):
            path, name = f"{ours}stages/{stage}/{blocks}/", f"{theirs}layer{stage + 1}.{number}."
            rules.append(Rule(rf"{path}conv(\d)/kernel", rf"{name}conv\1.weight", CONV, first_layer))
            rules += [Rule(rf"{path}norm(\d)/{a}", rf"{name}bn\1.{b}", SAME, first_layer) for a, b in _BATCH_NORM]
        path, name = f"{ours}stages/{stage}/first/", f"{theirs}layer{stage + 1}.0.downsample."
        rules.append(Rule(f"{path}shortcut_conv/kernel", f"{name}0.weight", CONV))
        rules += [Rule(f"{path}shortcut_norm/{a}", f"{name}1.{b}") for a, b in _BATCH_NORM]
    return rules


def _linear_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    return [Rule(f"{ours}/{a}", f"{theirs}.{b}", layout, first_layer) for a, b, layout in _LINEAR]


def _norm_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    return [Rule(f"{ours}/{a}", f"{theirs}.{b}", SAME, first_layer) for a, b in _NORM]


def _perceiver_attention_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    names = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "projection"))
    return [rule for a, b in names for rule in _linear_rules(f"{ours}/{a}", f"{theirs}.{b}", first_layer)]


def _perceiver_layer_rules(ours: str, theirs: str, norms: dict[str, str], first_layer=None) -> list[Rule]:
    """Attention, MLP and norms of one layer of Perceiver IO; `norms` maps our names of the norms to theirs."""
    rules = _perceiver_attention_rules(f"{ours}/attention", f"{theirs}.attention", first_layer)
    for i, j in ((0, 0), (1, 2)):
        rules += _linear_rules(f"{ours}/mlp/layers/{i}", f"{theirs}.mlp.mlp.{j}", first_layer)
    for a, b in {**norms, "mlp_norm": "qkv_layer_norm"}.items():
        rules += _norm_rules(f"{ours}/{a}", f"{theirs}.{b}", first_layer)
    return rules


def deperceiver_rules(model: ConfigDict) -> NameRules:
    """The released DePerceiver's names; `model` is config.model.

    The published decoder (one cross-attention) and the multi-layer one are different classes there, and so are the
    input projections of one and of several strides.
    """
    cross_norms = {"query_norm": "q_layer_norm", "token_norm": "kv_layer_norm"}
    decoder = model.decoder
    single = decoder.num_layers == 1 and not decoder.self_attention and not decoder.final_norm
    their_decoder = "perceiver.decoder" if single else "perceiver.decoder.layers.{layer}"
    level = "" if len(model.strides) == 1 else r".\1"
    rules = [
        *resnet_rules("backbone/", "backbone.backbone.body."),
        Rule(r"levels/projections/(\d)/kernel", f"input_proj{level}.weight", POINTWISE),
        Rule(r"levels/projections/(\d)/bias", f"input_proj{level}.bias"),
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
        *_norm_rules("decoder/layers/layers/self_attention_norm", f"{their_decoder}.norm1", 0),
        *_norm_rules("decoder/norm", "perceiver.decoder.norm"),
        *_linear_rules("heads/class_head/linear", "class_embed"),
        *_linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), (*_NOT_PARAMETERS, r"^criterion\.empty_weight$"))


def _torch_attention_rules(ours: str, theirs: str, first_layer=None) -> list[Rule]:
    """torch.nn.MultiheadAttention: the three input layers are one array, the output layer is a linear layer."""
    rules = _linear_rules(f"{ours}/out", f"{theirs}.out_proj", first_layer)
    for third, part in enumerate(("query", "key", "value")):
        rules.append(Rule(f"{ours}/{part}/kernel", f"{theirs}.in_proj_weight", LINEAR, first_layer, third))
        rules.append(Rule(f"{ours}/{part}/bias", f"{theirs}.in_proj_bias", SAME, first_layer, third))
    return rules


def _transformer_rules() -> list[Rule]:
    """DETR's encoder and decoder; the norms are numbered in the order of their sublayers."""
    rules = []
    for half, attentions in (
        ("encoder", {"attention": "self_attn"}),
        ("decoder", {"self_attention": "self_attn", "cross_attention": "multihead_attn"}),
    ):
        ours, theirs = f"{half}/layers/layers", f"transformer.{half}.layers.{{layer}}"
        for number, (a, b) in enumerate(attentions.items(), start=1):
            rules += _torch_attention_rules(f"{ours}/{a}", f"{theirs}.{b}", 0)
            rules += _norm_rules(f"{ours}/{a}_norm", f"{theirs}.norm{number}", 0)
        rules += _norm_rules(f"{ours}/mlp_norm", f"{theirs}.norm{len(attentions) + 1}", 0)
        for layer in (0, 1):
            rules += _linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.linear{layer + 1}", 0)
        rules += _norm_rules(f"{half}/norm", f"transformer.{half}.norm")
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
        *_linear_rules("heads/class_head/linear", "class_embed"),
        *_linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_embed.layers.\1"),
    ]
    return NameRules(tuple(rules), _NOT_PARAMETERS)


def _deformable_attention_rules(ours: str, theirs: str) -> list[Rule]:
    names = {"value": "value_proj", "out": "output_proj"}
    layers = ("value", "out", "sampling_offsets", "attention_weights")
    return [r for a in layers for r in _linear_rules(f"{ours}/{a}", f"{theirs}.{names.get(a, a)}", 0)]


def _deformable_transformer_rules() -> list[Rule]:
    """The decoder attends to itself first, but its norms are numbered as if it did so second."""
    rules = []
    for half, norms in (
        ("encoder", ("attention_norm", "mlp_norm")),
        ("decoder", ("cross_attention_norm", "self_attention_norm", "mlp_norm")),
    ):
        ours, theirs = f"{half}/layers/layers", f"transformer.{half}.layers.{{layer}}"
        for number, norm in enumerate(norms, start=1):
            rules += _norm_rules(f"{ours}/{norm}", f"{theirs}.norm{number}", 0)
        for layer in (0, 1):
            rules += _linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.linear{layer + 1}", 0)
    decoder = "transformer.decoder.layers.{layer}"
    return [
        *rules,
        *_deformable_attention_rules("encoder/layers/layers/attention", "transformer.encoder.layers.{layer}.self_attn"),
        *_torch_attention_rules("decoder/layers/layers/self_attention", f"{decoder}.self_attn", 0),
        *_deformable_attention_rules("decoder/layers/layers/cross_attention", f"{decoder}.cross_attn"),
    ]


def _deformable_head_rules(ours: str, number: str, first_layer=None) -> list[Rule]:
    return [
        *_linear_rules(f"{ours}class_head/linear", f"class_embed.{number}", first_layer),
        *_linear_rules(rf"{ours}box_head/mlp/layers/(\d)", rf"bbox_embed.{number}.layers.\1", first_layer),
    ]


def deformable_detr_rules(model: ConfigDict) -> NameRules:
    """The released Deformable DETR's names.

    Its state dict repeats the heads: those that all layers share, once a layer; those of refining layers, and of the
    proposals, under the decoder too. Files of the README's first links hold counts of operations beside parameters.
    """
    layers = model.decoder.num_layers
    rules = [
        *resnet_rules("backbone/", "backbone.0.body."),
        *_norm_rules(r"levels/norms/(\d+)", r"input_proj.\1.1"),
        Rule(r"levels/projections/(\d+)/bias", r"input_proj.\1.0.bias"),
        Rule("level_embedding", "transformer.level_embed"),
        *_deformable_transformer_rules(),
        *_deformable_head_rules("decoder/heads/", "0"),
        *_deformable_head_rules("decoder/layers/layers/heads/", "{layer}", 0),
        Rule("queries", "query_embed.weight"),
        *_linear_rules("reference_points", "transformer.reference_points"),
        *_linear_rules("proposals/output", "transformer.enc_output"),
        *_norm_rules("proposals/output_norm", "transformer.enc_output_norm"),
        *_linear_rules("proposals/query", "transformer.pos_trans"),
        *_norm_rules("proposals/query_norm", "transformer.pos_trans_norm"),
        *_deformable_head_rules("proposals/", str(layers)),
    ]
    for level in range(len(model.strides) + model.extra_levels):
        layout = POINTWISE if level < len(model.strides) else CONV
        rules.append(Rule(f"levels/projections/{level}/kernel", f"input_proj.{level}.0.weight", layout))
    if model.refine:
        heads = ("bbox_embed", "class_embed") if model.two_stage else ("bbox_embed",)
        copies = [(rf"({'|'.join(heads)})\.(.*)", r"transformer.decoder.\1.\2")]
    else:
        copies = [(r"(class_embed|bbox_embed)\.0\.(.*)", rf"\1.{layer}.\2") for layer in range(1, layers)]
    ignored = (*_NOT_PARAMETERS, r"(^|\.)total_(params|ops)$")
    return NameRules(tuple(rules), ignored, tuple(copies))


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
                rules += _linear_rules(f"{ours}/{a}/{part}", f"{theirs}.{b}.{part[0]}_proj", 0)
            rules += _linear_rules(f"{ours}/{a}/out", f"{theirs}.{b}.out_proj", 0)
            rules += _norm_rules(f"{ours}/{a}_norm", f"{theirs}.{b}_layer_norm", 0)
        rules += _norm_rules(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm", 0)
        for layer in (0, 1):
            rules += _linear_rules(f"{ours}/mlp/layers/{layer}", f"{theirs}.fc{layer + 1}", 0)
    return [*rules, *_norm_rules("decoder/norm", "model.decoder.layernorm")]


def _hugging_face_resnet_rules(ours: str, theirs: str) -> list[Rule]:
    """The names of a ResNet of three-convolution blocks in transformers, where it is not timm's."""
    stem = f"{theirs}embedder.embedder."
    rules = [Rule(f"{ours}stem_conv/kernel", f"{stem}convolution.weight", CONV)]
    rules += [Rule(f"{ours}stem_norm/{a}", f"{stem}normalization.{b}") for a, b in _BATCH_NORM]
    for stage in range(4):
        layers = f"{theirs}encoder.stages.{stage}.layers."
        for blocks, number, first_layer in (("first", "0", None), ("rest/layers", "{layer}", 1)):
            for conv in range(3):
                path, name = f"{ours}stages/{stage}/{blocks}/", f"{layers}{number}.layer.{conv}."
                rules.append(Rule(f"{path}conv{conv + 1}/kernel", f"{name}convolution.weight", CONV, first_layer))
                rules += [
                    Rule(f"{path}norm{conv + 1}/{a}", f"{name}normalization.{b}", SAME, first_layer)
                    for a, b in _BATCH_NORM
                ]
        path, name = f"{ours}stages/{stage}/first/", f"{layers}0.shortcut."
        rules.append(Rule(f"{path}shortcut_conv/kernel", f"{name}convolution.weight", CONV))
        rules += [Rule(f"{path}shortcut_norm/{a}", f"{name}normalization.{b}") for a, b in _BATCH_NORM]
    return rules


def _hugging_face_detr_rules(resnet: Callable[[str, str], list[Rule]]) -> NameRules:
    """DETR's names in transformers (DetrForObjectDetection), with one of the two backbones it can have."""
    rules = [
        *resnet("backbone/", "model.backbone.conv_encoder.model."),
        Rule("position/column", "model.backbone.position_embedding.column_embeddings.weight"),
        Rule("position/row", "model.backbone.position_embedding.row_embeddings.weight"),
        Rule("projection/kernel", "model.input_projection.weight", POINTWISE),
        Rule("projection/bias", "model.input_projection.bias"),
        *_hugging_face_transformer_rules(),
        Rule("decoder/query_position", "model.query_position_embeddings.weight"),
        *_linear_rules("heads/class_head/linear", "class_labels_classifier"),
        *_linear_rules(r"heads/box_head/mlp/layers/(\d)", r"bbox_predictor.layers.\1"),
    ]
    return NameRules(tuple(rules), _NOT_PARAMETERS)


# config.model.name -> the rules of the detector that config.model describes
FAMILIES: dict[str, Callable[[ConfigDict], NameRules]] = {
    "deperceiver": deperceiver_rules,
    "detr": detr_rules,
    "deformable_detr": deformable_detr_rules,
}

# The same, for each program whose names a file can have: `hugging_face` is transformers with a timm backbone, as the
# published files are, `hugging_face_resnet` transformers with its own.
LAYOUTS: dict[str, dict[str, Callable[[ConfigDict], NameRules]]] = {
    "official": FAMILIES,
    "hugging_face": {"detr": lambda model: _hugging_face_detr_rules(resnet_rules)},
    "hugging_face_resnet": {"detr": lambda model: _hugging_face_detr_rules(_hugging_face_resnet_rules)},
}


# config.model.name -> the key under which the official programs keep the state dict in a .pth or .ckpt
WRAPPERS = {"deperceiver": "state_dict", "detr": "model", "deformable_detr": "model"}


def official_buffers(config: ConfigDict) -> dict[str, np.ndarray]:
    """What the official state dict of `config` (the whole of it) has besides the model, by name.

    DePerceiver's is that of a training module, whose loss holds the weight of each logit's class.
    """
    if config.model.name != "deperceiver" or not config.model.no_object_logit:
        return {}
    weights = np.ones(config.model.num_classes + 1, np.float32)
    weights[-1] = config.loss.no_object_weight
    return {"criterion.empty_weight": weights}


def layout_of(state: Mapping[str, np.ndarray]) -> str:
    """Which of LAYOUTS the names of a detector's state dict are of."""
    encoder = "model.backbone.conv_encoder.model."
    if not any(name.startswith(encoder) for name in state):
        return "official"
    own = any(name.startswith(f"{encoder}embedder.") for name in state)
    return "hugging_face_resnet" if own else "hugging_face"


# --------------------------------------------------------------------------------------------- pretrained backbones

_BACKBONE_PREFIXES = (
    "",  # torchvision, timm
    "backbone.0.body.",  # DETR, Deformable DETR, SMCA
    "backbone.backbone.body.",  # DePerceiver
    "model.backbone.conv_encoder.model.",  # DETR in transformers
    "module.",  # what DistributedDataParallel leaves
)


def load_backbone(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{our path: array} of the ResNet in a torchvision, timm or detector checkpoint.

    `shapes` are those of a detector's parameters and frozen arrays, by path; those under `backbone/` are answered, all
    of them. The classifier and the stages that they do without are passed over. Raises UserError as `from_torch` does.
    """
    return backbone_from_torch(read_state_dict(path), shapes, source=path)


def is_only_a_backbone(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is that of a torchvision or timm ResNet."""
    return any(f"{prefix}conv1.weight" in state for prefix in ("", "module."))


def backbone_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, source: str | Path
) -> dict[str, np.ndarray]:
    """`load_backbone`, of a state dict that was read from `source`."""
    shapes = {name: shape for name, shape in shapes.items() if name.startswith("backbone/")}
    prefix = next((p for p in _BACKBONE_PREFIXES if f"{p}conv1.weight" in state), None)
    if prefix is None:
        raise UserError(f"{source} holds no ResNet: conv1.weight is not in it.")
    state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    stages = {stage for stage in range(4) if any(name.startswith(f"backbone/stages/{stage}/") for name in shapes)}
    absent = tuple(rf"^layer{stage + 1}\." for stage in set(range(4)) - stages)
    rules = NameRules(tuple(resnet_rules("backbone/")), (*_NOT_PARAMETERS, r"^fc\.(weight|bias)$", *absent))
    return from_torch(state, shapes, rules, source=source)[0]

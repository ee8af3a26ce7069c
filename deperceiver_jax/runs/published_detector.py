"""Detectors as transformers stores them, a folder with config.json and model.safetensors: read without importing it.

config.json decides which of our configs they are of: DETR and Deformable DETR with a ResNet, as published by
facebook/detr-resnet-* and SenseTime/deformable-detr* on the Hugging Face hub, and what was fine-tuned from them.
Source: DetrConfig, DeformableDetrConfig and ResNetConfig of transformers 5.24, whose defaults absent fields have.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import parse_config, shipped_configs
from deperceiver_jax.runs.workdir import CONFIG
from deperceiver_jax.weights import hub

_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101}  # of ResNets of three-convolution blocks
_UNUSED = "N/A"  # what published files call COCO's unused slots


def is_published(directory: Path) -> bool:
    """Whether a directory is one that transformers, or timm, has written."""
    return (directory / hub.WEIGHTS).is_file()


def published_config(directory: Path) -> ConfigDict:
    """Our config of the detector. Raises UserError for another architecture, and for parts that no config has."""
    try:
        return _config(directory, _read(directory), str(directory / CONFIG))
    except (AttributeError, TypeError, ValueError) as error:  # a text where a number is to be, for example
        raise UserError(f"{directory / CONFIG} is no whole config: {error}.") from None


def _config(directory: Path, theirs: Mapping[str, Any], source: str) -> ConfigDict:
    family = theirs.get("model_type")
    if family not in ("detr", "deformable_detr"):
        if "architecture" in theirs:  # timm's word
            raise UserError(
                f"{source} is of {theirs['architecture']}, no detector: a ResNet is for config.model.backbone.weights."
            )
        raise UserError(f"{source} is of {family or 'no architecture'}; detr and deformable_detr can be read.")
    _refuse_other_parts(theirs, source)
    levels = theirs.get("num_feature_levels", 4) if family == "deformable_detr" else 1
    if levels == 2:
        raise UserError(f"{source}: num_feature_levels is 2; it can be 1, or 3 and more.")

    config = parse_config(["", f"--config={shipped_configs() / family}.py:r50"])
    model = config.model
    model.num_classes = len(_labels(theirs))
    model.num_queries = theirs.get("num_queries", 100 if family == "detr" else 300)
    model.embed_dim = theirs.get("d_model", 256)
    for half in ("encoder", "decoder"):
        model[half].num_layers = theirs.get(f"{half}_layers", 6)
        model[half].num_heads = theirs.get(f"{half}_attention_heads", 8)
        model[half].mlp_dim = theirs.get(f"{half}_ffn_dim", 2048 if family == "detr" else 1024)
    model.backbone.update(weights="", **_backbone(theirs, source))
    last = (16,) if model.backbone.dilation else (32,)
    model.strides = last if levels == 1 else (8, 16, *last)
    if family == "detr":
        model.position.encoding = theirs.get("position_embedding_type", "sine")
    else:
        model.extra_levels = levels - len(model.strides)
        model.refine, model.two_stage = theirs.get("with_box_refine", False), theirs.get("two_stage", False)
        if model.two_stage:
            model.num_queries = theirs.get("two_stage_num_proposals", 300)
        for half in ("encoder", "decoder"):
            model[half].num_points = theirs.get(f"{half}_n_points", 4)
    config.data.eval_scale, config.data.eval_max_size = _scaling(directory)
    return config


def published_classes(directory: Path) -> ClassMap:
    """The classes by the labels of config.json; COCO's where its names are in its slots. Raises UserError."""
    labels = _labels(_read(directory))
    if all(labels.get(slot) == name for slot, name in COCO_CATEGORIES.items()):
        return ClassMap.from_categories(COCO_CATEGORIES.items())
    slots = tuple(slot for slot, name in labels.items() if name != _UNUSED)
    return ClassMap(slots, tuple(labels[slot] for slot in slots), slots, len(labels))


def published_params(file: Path) -> dict[str, np.ndarray]:
    """All arrays of the detector by path, of its model.safetensors. Raises UserError for what is not config.json's."""
    # Not above: they start JAX, which a config does not need.
    from deperceiver_jax.weights.importing import import_detector
    from deperceiver_jax.weights.torch_checkpoint import read_state_dict

    config, state = published_config(file.parent), read_state_dict(file)
    model = config.model
    head = "class_labels_classifier.bias" if model.no_object_logit else "class_embed.0.bias"
    rows, expected = len(state.get(head, ())), model.num_classes + model.no_object_logit
    if head in state and rows != expected:
        raise UserError(
            f"{file}: {head} is of {rows - model.no_object_logit} classes, and {CONFIG} beside it names "
            f"{model.num_classes}."
        )
    return import_detector(config, state, file, given=set(), other_classes=False, allow_leftovers=False).arrays


def _refuse_other_parts(theirs: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a value that makes another computation than ours of the same parameters."""
    positions = ("sine", "learned") if theirs["model_type"] == "detr" else ("sine",)
    for field, values in {
        "activation_function": ("relu",),
        "position_embedding_type": positions,
        "num_channels": (3,),
    }.items():
        if theirs.get(field, values[0]) not in values:
            raise UserError(f"{source}: {field} is {theirs[field]!r}; it can be {' or '.join(map(str, values))}.")


def _backbone(theirs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of config.model.backbone, from either of the two ways in which transformers names a ResNet."""
    resnet = theirs.get("backbone_config") or {"model_type": "timm_backbone"}
    if resnet.get("model_type") == "timm_backbone":
        name = resnet.get("backbone") or theirs.get("backbone") or "resnet50"
        if not (match := re.fullmatch(r"resnet(18|34|50|101)(\.\w+)?", name)):
            raise UserError(f"{source}: the backbone is {name}; it can be resnet18, resnet34, resnet50 or resnet101.")
        dilation = bool(theirs.get("dilation")) or resnet.get("output_stride") == 16
        return {"depth": int(match[1]), "dilation": dilation}
    width, depth = resnet.get("embedding_size", 64), _DEPTHS.get(tuple(resnet.get("depths", (3, 4, 6, 3))))
    ours = {
        "model_type": "resnet",
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "hidden_sizes": [4 * width, 8 * width, 16 * width, 32 * width],
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    others = [f"{field} {resnet[field]!r}" for field, value in ours.items() if resnet.get(field, value) != value]
    if others or depth is None:
        raise UserError(
            f"{source}: the backbone has {others[0] if others else 'other depths'}; it can be a ResNet-50 or -101 of "
            "bottleneck layers."
        )
    return {"depth": depth, "width": width}


def _labels(theirs: Mapping[str, Any]) -> dict[int, str]:
    """{class slot: name}, of all slots in order."""
    labels = {int(slot): str(name) for slot, name in (theirs.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}).items()}
    return {slot: labels.get(slot, _UNUSED) for slot in range(max(labels) + 1)}


def _scaling(directory: Path) -> tuple[int, int]:
    """(short side, longest side) to which its pictures are scaled; DETR's 800 and 1333 where no file tells."""
    file = directory / hub.SCALING
    stated = _json(file) if file.is_file() else {}
    size: Any = stated.get("size", 800)  # a number, in files of earlier versions
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    short, longest = size.get("shortest_edge"), size.get("longest_edge", stated.get("max_size", 1333))
    if not isinstance(short, int) or not isinstance(longest, int) or min(short, longest) < 1:
        raise UserError(f"{file}: its size is to be a shortest_edge and a longest_edge.")
    return short, longest


def _read(directory: Path) -> dict[str, Any]:
    return _json(directory / CONFIG)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no config: it is not a JSON object.")
    return content

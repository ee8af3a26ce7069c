"""Pretrained ResNets, alone or inside a detector's checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path
from deperceiver_jax.weights import hub
from deperceiver_jax.weights.name_rules import NameRules, from_torch
from deperceiver_jax.weights.tables.parts import NOT_PARAMETERS, resnet_rules
from deperceiver_jax.weights.torch_checkpoint import read_state_dict

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
    of them but for the offsets of deformable convolutions, which start anew. The classifier and the stages that they do
    without are passed over. `path` may be a name of the hub, of a ResNet or a detector. Raises UserError as
    `from_torch` does.
    """
    return backbone_from_torch(read_state_dict(find_backbone(path)), shapes, source=path)


def find_backbone(path: str | Path) -> Path:
    """The file of a checkpoint, fetched where `path` is a name of the hub. Raises UserError where it cannot be."""
    return hub.fetch(path) / hub.WEIGHTS if isinstance(path, str) and hub.is_hub_name(path) else as_path(path)


def is_only_a_backbone(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is that of a torchvision or timm ResNet."""
    return any(f"{prefix}conv1.weight" in state for prefix in ("", "module."))


def backbone_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, source: str | Path
) -> dict[str, np.ndarray]:
    """`load_backbone`, of a state dict that was read from `source`."""
    shapes = {name: shape for name, shape in shapes.items() if name.startswith("backbone/") and "/offsets/" not in name}
    prefix = next((p for p in _BACKBONE_PREFIXES if f"{p}conv1.weight" in state), None)
    if prefix is None:
        raise UserError(f"{source} holds no ResNet: conv1.weight is not in it.")
    state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    _check_groups(state, shapes, source)
    stages = {stage for stage in range(4) if any(name.startswith(f"backbone/stages/{stage}/") for name in shapes)}
    absent = tuple(rf"^layer{stage + 1}\." for stage in set(range(4)) - stages)
    rules = NameRules(tuple(resnet_rules("backbone/")), (*NOT_PARAMETERS, r"^fc\.(weight|bias)$", *absent))
    return from_torch(state, shapes, rules, source=source)[0]


def _check_groups(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    """Raises UserError, with the fields that fit, for the ResNeXt of `state` and another network of the same width."""
    inner, outer = (state.get(f"layer1.0.conv{number}.weight") for number in (2, 3))
    ours, ours_outer = (shapes.get(f"backbone/stages/0/first/conv{number}/kernel") for number in (2, 3))
    if inner is None or outer is None or ours is None or ours_outer is None:
        return
    if inner.shape[1::-1] != ours[2:] and outer.shape[0] == ours_outer[3]:
        groups, ratio = inner.shape[0] // inner.shape[1], 4 * inner.shape[0] // outer.shape[0]
        fields = f"config.model.backbone.groups={groups} and config.model.backbone.inner_ratio={ratio}"
        raise UserError(f"The network in {source} is another one; it fits with {fields}.")

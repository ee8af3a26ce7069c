"""The tables of official names: one a family and program."""

from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.weights.name_rules import NameRules
from deperceiver_jax.weights.tables.deformable_detr import deformable_detr_rules
from deperceiver_jax.weights.tables.deperceiver import deperceiver_rules
from deperceiver_jax.weights.tables.detr import detr_rules
from deperceiver_jax.weights.tables.hugging_face import (
    hugging_face_deformable_detr_rules,
    hugging_face_detr_rules,
    hugging_face_resnet_rules,
)
from deperceiver_jax.weights.tables.parts import resnet_rules
from deperceiver_jax.weights.tables.smca import smca_rules

# config.model.name -> the rules of the detector that config.model describes
FAMILIES: dict[str, Callable[[ConfigDict], NameRules]] = {
    "deperceiver": deperceiver_rules,
    "detr": detr_rules,
    "deformable_detr": deformable_detr_rules,
    "smca": smca_rules,
}

# The same, for each program whose names a file can have: `hugging_face` is transformers with a timm backbone, as the
# published files are, `hugging_face_resnet` transformers with its own.
LAYOUTS: dict[str, dict[str, Callable[[ConfigDict], NameRules]]] = {
    "official": FAMILIES,
    "hugging_face": {
        "detr": lambda model: hugging_face_detr_rules(resnet_rules),
        "deformable_detr": lambda model: hugging_face_deformable_detr_rules(model, resnet_rules),
    },
    "hugging_face_resnet": {
        "detr": lambda model: hugging_face_detr_rules(hugging_face_resnet_rules),
        "deformable_detr": lambda model: hugging_face_deformable_detr_rules(model, hugging_face_resnet_rules),
    },
}


# config.model.name -> the key under which the official programs keep the state dict in a .pth or .ckpt
WRAPPERS = {"deperceiver": "state_dict", "detr": "model", "deformable_detr": "model", "smca": "model"}


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

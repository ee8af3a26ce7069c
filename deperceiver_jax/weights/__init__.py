"""Published weights: how PyTorch's files are read, and which of their names are which of our parameters."""

from deperceiver_jax.weights.backbone import load_backbone
from deperceiver_jax.weights.name_rules import load_torch_state, to_torch_state, torch_shapes
from deperceiver_jax.weights.tables import FAMILIES
from deperceiver_jax.weights.torch_checkpoint import read_state_dict

__all__ = ["FAMILIES", "load_backbone", "load_torch_state", "read_state_dict", "to_torch_state", "torch_shapes"]

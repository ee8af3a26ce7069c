"""The detectors, by name, and how a config becomes one."""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.attention import MultiHeadAttention
from deperceiver_jax.models.attention_choice import IMPLEMENTATIONS
from deperceiver_jax.models.deformable_detr import DeformableDETR
from deperceiver_jax.models.deperceiver import DePerceiver
from deperceiver_jax.models.deperceiver_plus import DePerceiverPlus
from deperceiver_jax.models.detr import DETR
from deperceiver_jax.models.layer_stack import LayerStack
from deperceiver_jax.models.parts import build_part
from deperceiver_jax.models.smca import SMCA

DETECTORS = {
    "deperceiver": DePerceiver,
    "deperceiver_plus": DePerceiverPlus,
    "detr": DETR,
    "deformable_detr": DeformableDETR,
    "smca": SMCA,
}
_COMPUTE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_detector(config: ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """The detector that `config.model` describes, with new parameters (`backbone.weights` is not read here).

    Called as `detector(image, pixel_valid, dropout_key=None) -> Predictions`; see DePerceiver, and DePerceiverPlus for
    hints. Raises UserError for a name, a precision or a field that does not exist.
    """
    for field in ("precision", "attention", "rematerialize"):
        if field not in config:
            raise UserError(f"The config has no field {field}: an earlier version wrote it, or an incomplete file.")
    model = config.model.to_dict()
    name = model.pop("name")
    if name not in DETECTORS:
        raise UserError(f"config.model.name is {name!r}; the detectors are {', '.join(DETECTORS)}.")
    if config.precision not in _COMPUTE_TYPES:
        raise UserError(f"config.precision is {config.precision!r}; it can be {' or '.join(_COMPUTE_TYPES)}.")
    if config.attention not in IMPLEMENTATIONS:
        raise UserError(f"config.attention is {config.attention!r}; it can be {', '.join(IMPLEMENTATIONS)}.")
    model["backbone"].pop("weights")
    dtype = _COMPUTE_TYPES[config.precision]
    detector = build_part(DETECTORS[name], "config.model", model, dtype=dtype, rngs=rngs)
    for _, part in nnx.iter_graph(detector):
        if isinstance(part, MultiHeadAttention):
            part.implementation = config.attention
        elif isinstance(part, LayerStack):
            part.rematerialize = config.rematerialize
    return detector

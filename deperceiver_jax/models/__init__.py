"""The detectors, by name, and how a config becomes one."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError, check_between, check_choice
from deperceiver_jax.field_needs import GENERAL, Need
from deperceiver_jax.models.attention.choice import IMPLEMENTATIONS
from deperceiver_jax.models.config_section import build_part
from deperceiver_jax.models.deformable_detr.deformable_detr import DeformableDETR
from deperceiver_jax.models.deperceiver.deperceiver import DePerceiver
from deperceiver_jax.models.deperceiver_plus.deperceiver_plus import DePerceiverPlus
from deperceiver_jax.models.detector import Detector, DetectorFields
from deperceiver_jax.models.detr.detr import DETR
from deperceiver_jax.models.layers.arrays import over_arrays, shape_of
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import Undrawn
from deperceiver_jax.models.smca.smca import SMCA

DETECTORS: dict[str, type[Detector]] = {
    "deperceiver": DePerceiver,
    "deperceiver_plus": DePerceiverPlus,
    "detr": DETR,
    "deformable_detr": DeformableDETR,
    "smca": SMCA,
}
LARGEST_SIZE = 100_000  # of anything in a detector
_COMPUTE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PORTABLE_TYPES = {"float16": jnp.float16}  # besides: too narrow for gradients


def field_needs(config: ConfigDict) -> dict[str, Need]:
    """Which fields of `config` have an effect only with some values of others; see field_needs.py."""
    detector = DETECTORS.get(config.model.name, Detector)  # a name that does not exist is refused later
    return {**GENERAL, **detector.needs}


def _check_sizes(section: ConfigDict, prefix: str = "config.model.") -> None:
    """Raises UserError for a number of layers, channels or heads from which no array could be made."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            _check_sizes(value, f"{prefix}{name}.")
        elif isinstance(value, int):
            check_between(f"{prefix}{name}", value, -LARGEST_SIZE, LARGEST_SIZE)


def build_detector(config: ConfigDict, *, rngs: nnx.Rngs, portable: bool = False) -> Detector:
    """The detector that `config.model` describes, with new parameters (`backbone.weights` is not read here).

    Called as `detector(image, pixel_valid) -> Predictions`; see Detector. portable: see layers/compute.py. Raises
    UserError for a name, a precision or a field that does not exist.
    """
    for field in ("precision", "attention", "rematerialize"):
        if field not in config:
            raise UserError(f"The config has no field {field}: an earlier version wrote it, or an incomplete file.")
    _check_sizes(config.model)
    model = config.model.to_dict()
    name = model.pop("name")
    check_choice("config.model.name", name, DETECTORS)
    types = _COMPUTE_TYPES | (_PORTABLE_TYPES if portable else {})
    check_choice("config.precision", config.precision, types)
    check_choice("config.attention", config.attention, IMPLEMENTATIONS)
    model["backbone"].pop("weights")
    rematerialize = config.rematerialize and not portable
    compute = Compute(types[config.precision], config.attention, rematerialize, portable)
    shared = {f.name: model.pop(f.name) for f in dataclasses.fields(DetectorFields) if f.name in model}
    fields = build_part(DetectorFields, "config.model", shared)
    detector = build_part(DETECTORS[name], "config.model", model, fields, compute=compute, rngs=rngs)
    return detector if isinstance(rngs, Undrawn) else over_arrays(jax.device_put, detector)


def abstract_detector(config: ConfigDict, *, portable: bool = False) -> Detector:
    """`build_detector` without numbers: each array is a jax.ShapeDtypeStruct, and nothing is traced or compiled."""
    return over_arrays(shape_of, build_detector(config, rngs=Undrawn(), portable=portable))

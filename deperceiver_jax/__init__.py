"""DETR-family object detection in JAX: DePerceiver and the detectors it is compared with.

The names below are loaded when they are first used, so that loader processes import the data rooms without JAX.
"""

import importlib

__version__ = "0.2.12"

_ROOMS = {
    "load": "deperceiver_jax.prediction.detector",
    "PictureDetections": "deperceiver_jax.prediction.detections",
    "build_detector": "deperceiver_jax.models",
    "load_detector": "deperceiver_jax.runs.load_detector",
    "Batch": "deperceiver_jax.structures",
    "Detections": "deperceiver_jax.structures",
    "Predictions": "deperceiver_jax.structures",
    "UserError": "deperceiver_jax.errors",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)

"""Data sets: from files on disk to batches of uint8 pixels. Nothing here computes with JAX.

The names below are loaded when they are first used, so that help texts need no data set's libraries.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deperceiver_jax.data.batches.loader import EvaluationBatches, TrainBatches
    from deperceiver_jax.data.classes import ClassMap, require_same_classes
    from deperceiver_jax.data.datasets.source import Source, open_source

__all__ = [
    "ClassMap",
    "EvaluationBatches",
    "Source",
    "TrainBatches",
    "open_source",
    "require_same_classes",
]
_ROOMS = {
    "ClassMap": "classes",
    "EvaluationBatches": "batches.loader",
    "Source": "datasets.source",
    "TrainBatches": "batches.loader",
    "open_source": "datasets.source",
    "require_same_classes": "classes",
}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""Data sets: from files on disk to batches of uint8 pixels. Nothing here computes with JAX."""

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

"""Data sets: from files on disk to batches of uint8 pixels. Nothing here computes with JAX."""

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.source import open_source

__all__ = ["ClassMap", "open_source"]

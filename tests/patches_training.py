"""tests/tiny_training.py without a ResNet, for processes that have JAX to themselves: they start in half the time."""

from deperceiver_jax.models import detector
from tests.drawn_arrays import Patches
from tests.tiny_training import get_config as get_config

detector.ResNet = Patches

"""For files of tests that run commands again and again: what depends on the config alone is made once.

Fixtures for a whole file, which imports those that it wants.
"""

import pytest

from deperceiver_jax.evaluation.evaluate import make_detect_step
from deperceiver_jax.models import abstract_detector


@pytest.fixture(scope="module", autouse=True)
def detect_steps_are_shared():
    """Commands with the same config and mesh get one jitted function; the detector's arrays are arguments of it."""
    made = {}

    def make(merge, config, mesh):
        key = config.to_json(), mesh
        if key not in made:
            made[key] = make_detect_step(merge, config.copy_and_resolve_references(), mesh)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for program in ("prediction.detector", "evaluation.evaluate_detector"):
            patch.setattr(f"deperceiver_jax.{program}.make_detect_step", make)
        yield


@pytest.fixture(scope="module", autouse=True)
def abstract_detectors_are_shared():
    """Loading and importing look at the shapes of one detector several times; nobody changes it."""
    made = {}

    def make(config):
        key = config.to_json()
        if key not in made:
            made[key] = abstract_detector(config)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("runs.load_detector", "weights.importing"):
            patch.setattr(f"deperceiver_jax.{module}.abstract_detector", make)
        yield

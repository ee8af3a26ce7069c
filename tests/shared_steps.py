"""For files of tests that run eval and predict again and again: the same detector is traced once."""

import pytest

from deperceiver_jax.evaluation.evaluate import make_detect_step


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

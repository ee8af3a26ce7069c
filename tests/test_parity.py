"""Training equal to the official one. `make parity` compares every model of tests/golden/cases.py, in full."""

import jax
import pytest

from tests.golden import cases
from tests.parity import compare

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def programs_are_let_go():
    """A compiled training step is large, and nothing after it here runs it again."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "name, steps",
    [
        ("detr_small_pre_norm_learned", cases.STEPS),
        ("deperceiver_small", 3),  # up to the first drop of the learning rate
        ("deformable_small_two_stage", 3),
        # Its training, which takes a minute to compile, is left to `make parity`.
        ("smca_small_conv", 0),
    ],
)
def test_training_is_the_official_one(name, steps):
    failures = [figure for figure in compare(name, steps=steps, optimized=False) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)

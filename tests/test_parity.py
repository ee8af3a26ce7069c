"""Five steps of training equal to the official ones. `make parity` compares every model of tests/golden/cases.py."""

import pytest

from tests.parity import compare


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "detr_small_no_auxiliary",
        "detr_small_pre_norm_learned",
        "detr_r50",
        "deperceiver_r50_16",
        "deformable_small_refine",
        "deformable_small_two_stage",
        "smca_small_coupled",
        "smca_small_conv",
    ],
)
def test_training_is_the_official_one(name):
    failures = [figure for figure in compare(name) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)

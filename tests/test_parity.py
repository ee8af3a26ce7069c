"""Five steps of training equal to the official ones. `make parity` compares every model of tests/golden/cases.py."""

import pytest

from tests.parity import compare


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "detr_small_pre_norm_learned",
        "deperceiver_r50_16",
        "deformable_small_two_stage",
    ],
)
def test_training_is_the_official_one(name):
    failures = [figure for figure in compare(name) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)


@pytest.mark.slow
def test_answers_and_losses_of_the_encoder_of_convolutions_are_the_official_ones():
    """Its training, which takes a minute and a half to compile, is left to `make parity`."""
    failures = [figure for figure in compare("smca_small_conv", training=False) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)

"""Five steps of training equal to the official ones; `python -m tests.parity` compares the full-size models as well."""

import pytest

from tests.parity import compare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr_small_no_auxiliary", "detr_small_pre_norm_learned"])
def test_training_is_the_official_one(name):
    failures = [figure for figure in compare(name) if not figure.passes]
    assert not failures, "\n".join(str(figure) for figure in failures)

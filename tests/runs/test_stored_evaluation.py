"""By which data an evaluation is known, and what is refused where they are others."""

import json

import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.evaluate import write_results
from deperceiver_jax.runs.stored_evaluation import check_evaluated, evaluated_data, require_evaluated
from deperceiver_jax.runs.workdir import data_fingerprint
from tests.runs.test_workdir import Split


def test_an_evaluation_knows_its_data(tmp_path):
    ours, other = Split(), Split(name="c.jpg")
    evaluation = tmp_path / "eval" / "9"
    check_evaluated(tmp_path, data_fingerprint(other))  # there is none
    write_results(tmp_path / "eval" / "3", {"AP": 0.5}, [], data_fingerprint(other))
    write_results(evaluation, {"AP": 0.5}, [])
    assert evaluated_data(evaluation) is None
    require_evaluated(evaluation, other)  # of a version that noted none
    check_evaluated(tmp_path, data_fingerprint(ours))

    write_results(evaluation, {"AP": 0.5}, [], data_fingerprint(ours))
    assert evaluated_data(evaluation) == json.loads(json.dumps(data_fingerprint(ours)))
    require_evaluated(evaluation, ours)
    check_evaluated(tmp_path, data_fingerprint(ours))
    with pytest.raises(UserError, match="other data: 2 images with 1 boxes there, as many, but other ones here."):
        require_evaluated(evaluation, other)
    with pytest.raises(UserError, match="The evaluation split is not what .* was evaluated on: .*allow_changed=True"):
        check_evaluated(tmp_path, data_fingerprint(other))

"""Planning, making and changing a TrainState."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.training.train_state import count_parameters, inference_arrays, replace_arrays

PARAMS = {"backbone/bias", "backbone/kernel", "gain", "head/bias", "head/kernel"}


def test_the_real_state_is_the_planned_one(tiny):
    plan = tiny(devices=4, ema_decay=0.9).plan
    state = plan.initialize()
    assert set(state.params) == set(state.ema) == PARAMS
    assert set(state.frozen) == {"scale"}
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(describe, state) == jax.tree.map(describe, plan.abstract)
    assert count_parameters(state) == (3 * 8 + 8 + 8 + 8 * 6 + 6, 3)


def test_a_group_with_multiplier_zero_is_frozen(tiny):
    frozen = {
        "backbone": {"pattern": "^backbone/", "multiplier": 0.0},
        "rest": {"pattern": "^(head/|gain)", "multiplier": 1.0},
    }
    run = tiny(groups=ConfigDict(frozen), weight_decay=0.1)
    state = run.plan.initialize()
    assert set(state.params) == {"gain", "head/bias", "head/kernel"}
    assert set(state.frozen) == {"scale", "backbone/bias", "backbone/kernel"}
    before = jax.device_get(state)
    after, _ = run.train(state, 0, 2)
    for path, array in before.frozen.items():
        np.testing.assert_array_equal(array, after.frozen[path])
    assert (np.asarray(after.params["head/kernel"]) != before.params["head/kernel"]).all()


def test_a_parameter_without_group_is_named(tiny):
    with pytest.raises(UserError, match="gain"):
        tiny(groups=ConfigDict({"backbone": {"pattern": "^backbone/", "multiplier": 0.1}}))


def test_inference_takes_the_average(tiny):
    run = tiny(ema_decay=0.5)
    state, _ = run.train(run.plan.initialize(), 0, 2)
    arrays = inference_arrays(state)
    assert set(arrays) == PARAMS | {"scale"}
    assert arrays["head/kernel"] is state.ema["head/kernel"]
    detector = run.plan.skeleton.merge(arrays)
    assert detector(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4), bool)).boxes.shape == (1, 2, 1, 4)


def test_replaced_arrays_start_params_and_average(tiny):
    state = tiny(ema_decay=0.5).plan.initialize()
    ones = np.ones((8,), np.float64)
    new = replace_arrays(state, {"backbone/bias": ones, "scale": np.zeros(3)}, origin="here")
    assert new.params["backbone/bias"].dtype == jnp.float32
    assert new.params["backbone/bias"].sharding == state.params["backbone/bias"].sharding
    np.testing.assert_array_equal(new.params["backbone/bias"], ones)
    np.testing.assert_array_equal(new.ema["backbone/bias"], ones)
    np.testing.assert_array_equal(new.frozen["scale"], 0.0)
    with pytest.raises(UserError, match="here has the parameter nose"):
        replace_arrays(state, {"nose": ones}, origin="here")
    with pytest.raises(UserError, match=r"here: scale has shape \(8,\), but this model's has \(3,\)"):
        replace_arrays(state, {"scale": ones}, origin="here")

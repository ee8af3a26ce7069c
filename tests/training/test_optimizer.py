"""AdamW, clipping, groups and schedules against hand-worked numbers and PyTorch's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.training.optimizer import (
    clip_by_global_norm,
    group_multipliers,
    learning_rate_schedule,
    make_optimizer,
)

GROUPS = ConfigDict({"slow": {"pattern": "^a", "multiplier": 0.1}, "rest": {"pattern": "^b", "multiplier": 1.0}})


def test_three_steps_equal_pytorch():
    """Printed by torch 2.13: AdamW with two groups, clip_grad_norm_(0.1) and StepLR(2); norms 0.504, 1.001, 1.501."""
    config = base().optimizer
    config.learning_rate, config.weight_decay, config.drop_epochs = 0.1, 0.1, (1,)
    schedule = learning_rate_schedule(config, steps_per_epoch=2, num_steps=3)
    optimizer = make_optimizer(config, schedule, group_multipliers(["a", "b"], GROUPS))
    params = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[3.0, -1.0]])}
    expected = [
        ([0.9890000224113464, -1.9880000352859497, 0.4895000457763672], [[2.870000123977661, -0.9900000095367432]]),
        ([0.9780095219612122, -1.9760105609893799, 0.4790090322494507], [[2.7541027069091797, -0.9056868553161621]]),
        ([0.9769114851951599, -1.9748127460479736, 0.47796088457107544], [[2.743971586227417, -0.896219789981842]]),
    ]
    state = optimizer.init(params)
    for i, (a, b) in enumerate(expected):
        gradients = {"a": jnp.array([0.3, -0.4, 0.01]) * (i + 1), "b": jnp.array([[0.06, 0.0]]) - 0.02 * i}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["a"], a, rtol=1e-6)
        np.testing.assert_allclose(params["b"], b, rtol=1e-6)


def test_clip_has_pytorchs_epsilon():
    """A gradient of norm exactly 0.1 is scaled by 0.1 / (0.1 + 1e-6); a smaller one is left alone."""
    clip = clip_by_global_norm(0.1)
    clipped, _ = clip.update({"a": jnp.array([0.06]), "b": jnp.array([0.08])}, clip.init({}))
    np.testing.assert_allclose(clipped["a"], 0.06 * (0.1 / (0.1 + 1e-6)), rtol=1e-7)
    assert clipped["a"][0] < 0.06
    small, _ = clip.update({"a": jnp.array([0.03])}, clip.init({}))
    assert small["a"][0] == jnp.float32(0.03)


def test_every_parameter_needs_one_group():
    assert group_multipliers(["b/kernel", "a/bias"], GROUPS) == {"a/bias": 0.1, "b/kernel": 1.0}
    with pytest.raises(UserError, match="none of rest, slow matches c/kernel"):
        group_multipliers(["a", "c/kernel"], GROUPS)
    with pytest.raises(UserError, match="both any and slow match a"):
        group_multipliers(["a"], ConfigDict({"slow": GROUPS.slow, "any": {"pattern": "", "multiplier": 1.0}}))


def test_step_schedule_drops_with_the_first_step_after_an_epoch():
    config = base().optimizer
    config.drop_epochs = (2, 3)
    schedule = learning_rate_schedule(config, steps_per_epoch=10, num_steps=40)
    rates = [float(schedule(step)) for step in (0, 19, 20, 29, 30, 39)]
    np.testing.assert_allclose(rates, [1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6], rtol=1e-6)


def test_warm_up_is_linear_and_cosine_ends_at_zero():
    config = base().optimizer
    config.schedule, config.warmup_steps, config.learning_rate = "cosine", 4, 1.0
    schedule = learning_rate_schedule(config, steps_per_epoch=10, num_steps=12)
    rates = [float(schedule(step)) for step in (0, 1, 2, 3, 4, 8, 12)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.0], atol=1e-7)
    config.schedule = "linear"
    with pytest.raises(UserError, match="config.optimizer.schedule is 'linear'"):
        learning_rate_schedule(config, steps_per_epoch=10, num_steps=12)

"""AdamW, clipping, groups and schedules against hand-worked numbers and PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.errors import UserError
from deperceiver_jax.training.optimizer import (
    clip_by_global_norm,
    global_norm,
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


PARAMETERS = {
    "dense/kernel": jnp.array([[0.5, 1.5, 0.0, -1.0], [-1.0, 0.75, 0.125, 0.5], [0.25, -0.5, 2.0, 1.0]]),
    "dense/bias": jnp.array([0.5, -0.5]),
}
GRADIENTS = {
    "dense/kernel": jnp.array([[0.3, 0.05, -0.6, 0.15], [-0.1, 0.4, 0.2, 0.0], [0.2, -0.25, 0.1, 0.35]]),
    "dense/bias": jnp.array([0.1, 0.2]),
}


def take_steps(name, params, gradients, count):
    config = base().optimizer
    config.update(name=name, weight_decay=0.1, clip_norm=0.0)
    optimizer = make_optimizer(config, lambda step: 0.1, dict.fromkeys(params, 1.0))
    state = optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_muon_equals_pytorch():
    """Printed by torch 2.14, in float64: Muon with match_rms_adamw, three steps with the same gradient.

    With gradients that change, Optax's momentum is corrected for its first steps, and PyTorch's is not.
    """
    moved = take_steps("muon", PARAMETERS, GRADIENTS, 3)
    expected = [
        [0.428389499990373, 1.4390983652149334, 0.09681816660286843, -1.0089924575593356],
        [-0.971798221939224, 0.6251953981805018, 0.07022925668012663, 0.44142228392218624],
        [0.19679834130414842, -0.47185665674318983, 1.9157342646774915, 0.8837968630751364],
    ]
    np.testing.assert_allclose(moved["dense/kernel"], expected, atol=2e-6)
    adamw = take_steps("adamw", PARAMETERS, GRADIENTS, 3)
    np.testing.assert_array_equal(moved["dense/bias"], adamw["dense/bias"])


@pytest.mark.parametrize("shape, axis", [((2, 3, 4), 0), ((3, 2, 2, 3, 4), 0), ((1, 3, 1, 4), None)])
def test_muon_takes_stacked_layers_and_convolutions_as_matrices(shape, axis):
    """A stack's layers move as they would alone, and a convolution as the matrix of all its inputs."""
    key = jax.random.key(0)
    param, gradient = (jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(2))

    def moved(param, gradient):
        return take_steps("muon", {"a/kernel": param}, {"a/kernel": gradient}, 2)["a/kernel"]

    together = moved(param, gradient)
    if axis is None:  # of each channel on its own: AdamW's
        alone = take_steps("adamw", {"a/kernel": param}, {"a/kernel": gradient}, 2)["a/kernel"]
    else:
        layers = [(p.reshape(-1, 4), g.reshape(-1, 4)) for p, g in zip(param, gradient, strict=True)]
        alone = jnp.stack([moved(*layer) for layer in layers]).reshape(shape)
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [PartitionSpec("model"), PartitionSpec(None, "model"), PartitionSpec(None, None, "model")]
)
def test_muon_moves_split_matrices_as_whole_ones(spec):
    key, shape = jax.random.key(0), (4, 16, 24)
    params, gradients = ({"a/kernel": jax.random.normal(jax.random.fold_in(key, i), shape)} for i in range(2))
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    split = jax.device_put((params, gradients), NamedSharding(mesh, spec))
    moved = jax.jit(lambda params, gradients: take_steps("muon", params, gradients, 1))(*split)
    np.testing.assert_allclose(moved["a/kernel"], take_steps("muon", params, gradients, 1)["a/kernel"], atol=1e-5)


def test_a_class_head_is_no_matrix_of_muon():
    params = {"decoder/class_head/linear/kernel": PARAMETERS["dense/kernel"]}
    gradients = {"decoder/class_head/linear/kernel": GRADIENTS["dense/kernel"]}
    muon, adamw = (take_steps(name, params, gradients, 2) for name in ("muon", "adamw"))
    np.testing.assert_array_equal(*muon.values(), *adamw.values())
    with pytest.raises(UserError, match="config.optimizer.name is 'sgd'"):
        take_steps("sgd", params, gradients, 1)


def test_clip_has_pytorchs_epsilon():
    """A gradient of norm exactly 0.1 is scaled by 0.1 / (0.1 + 1e-6); a smaller one is left alone."""
    clip = clip_by_global_norm(0.1)
    clipped, _ = clip.update({"a": jnp.array([0.06]), "b": jnp.array([0.08])}, clip.init({}))
    np.testing.assert_allclose(clipped["a"], 0.06 * (0.1 / (0.1 + 1e-6)), rtol=1e-7)
    assert clipped["a"][0] < 0.06
    small, _ = clip.update({"a": jnp.array([0.03])}, clip.init({}))
    assert small["a"][0] == jnp.float32(0.03)


def test_the_norm_is_of_all_numbers_of_all_arrays():
    """Small ones, which are summed together, and large ones, which may be split over devices."""
    shapes = {"a": (3,), "b": (), "c": (64, 64), "d": (2, 40, 60), "e": (5, 7)}
    arrays = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
    expected = np.sqrt(sum(np.square(x).sum() for x in arrays.values()))
    given = {path: jnp.asarray(x, jnp.float32) for path, x in arrays.items()}
    assert global_norm(given) == pytest.approx(expected, rel=1e-6)
    assert global_norm({path: given[path] for path in ("c", "d")}) == pytest.approx(
        np.sqrt(sum(np.square(arrays[path]).sum() for path in ("c", "d"))), rel=1e-6
    )
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    split = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())), given)
    split["c"] = jax.device_put(given["c"], NamedSharding(mesh, PartitionSpec("model")))
    assert jax.jit(global_norm)(split) == pytest.approx(expected, rel=1e-6)


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

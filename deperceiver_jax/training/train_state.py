"""Everything that training changes, as one pytree of arrays keyed by "/"-joined parameter path.

A detector is kept in two parts: its Skeleton (structure, no arrays) and its arrays, of which `params` are trained and
`frozen` are not: the variables that are not `nnx.Param`, and parameters whose group has multiplier 0.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.skeleton import Skeleton, take_apart
from deperceiver_jax.sharding import state_sharding
from deperceiver_jax.training.optimizer import group_multipliers, make_optimizer


class TrainState(NamedTuple):
    """Dicts are keyed by path, for example "decoder/norm/scale"."""

    step: Int32[Array, ""]  # optimiser steps taken: also the data position and the seed of a step's randomness
    params: dict[str, Array]  # float32, trained
    frozen: dict[str, Array]  # what else the detector computes with
    opt_state: optax.OptState
    ema: dict[str, Array]  # moving average of params; empty without one


class Plan(NamedTuple):
    """What the arrays of a run will be, known before one of them exists."""

    skeleton: Skeleton
    optimizer: optax.GradientTransformation
    abstract: TrainState  # of ShapeDtypeStruct with shardings
    initialize: Callable[[], TrainState]  # makes the same arrays, on their devices


def plan_train_state(build: Callable[[], nnx.Module], config: ConfigDict, schedule: optax.Schedule, mesh: Mesh) -> Plan:
    """Prepares a TrainState for the detector that `build` makes. `config` is `config.optimizer`.

    The abstract and the real state come from the same function, so a restored state, a new one and one that is only
    compiled for have the same arrays. Raises UserError for a parameter that fits no group.
    """
    skeleton, params, _ = take_apart(nnx.eval_shape(build))
    multipliers = group_multipliers(params, config.groups)
    optimizer = make_optimizer(config, schedule, multipliers)

    def new_state() -> TrainState:
        # astype makes the types strong, as a step's results are: a weak one (jnp.full's) would have it compiled twice.
        params, frozen = jax.tree.map(lambda x: x.astype(x.dtype), take_apart(build())[1:])
        trained = {path: x for path, x in params.items() if multipliers[path]}
        frozen |= {path: x for path, x in params.items() if not multipliers[path]}
        ema = {path: jnp.copy(x) for path, x in trained.items()} if config.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), ema)

    abstract = jax.eval_shape(new_state)
    shardings = state_sharding(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )
    # This program runs once, so on CPUs it is not worth optimising: that would more than double the time to compile it.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    initialize = jax.jit(new_state, out_shardings=shardings, compiler_options=quick)
    return Plan(skeleton, optimizer, abstract, initialize)


def inference_arrays(state: TrainState) -> dict[str, Array]:
    """All arrays of the detector that is evaluated: the moving average where there is one."""
    return {**state.frozen, **state.params, **state.ema}


def replace_arrays(state: TrainState, arrays: Mapping[str, np.ndarray], *, origin: str) -> TrainState:
    """The state that starts from `arrays` (some of the detector's, by path), which come from `origin`.

    Raises UserError for a path the detector lacks or a shape that differs.
    """
    mine = {**state.frozen, **state.params}
    for path, array in arrays.items():
        if path not in mine:
            raise UserError(f"{origin} has the parameter {path}, which this model lacks.")
        if mine[path].shape != array.shape:
            raise UserError(f"{origin}: {path} has shape {array.shape}, but this model's has {mine[path].shape}.")

    def replace(old: dict[str, Array]) -> dict[str, Array]:
        # The copy is this state's own: steps donate their state, and `params` and `ema` must not share a buffer.
        return {
            path: jax.device_put(np.array(arrays[path], x.dtype), x.sharding) if path in arrays else x
            for path, x in old.items()
        }

    return state._replace(params=replace(state.params), frozen=replace(state.frozen), ema=replace(state.ema))


def count_parameters(state: TrainState) -> tuple[int, int]:
    """(numbers in trained parameters, numbers that are frozen)."""
    return sum(x.size for x in state.params.values()), sum(x.size for x in state.frozen.values())

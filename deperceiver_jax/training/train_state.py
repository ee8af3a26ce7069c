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
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError
from deperceiver_jax.models.layers.arrays import over_arrays, shape_of
from deperceiver_jax.models.layers.initializers import Undrawn
from deperceiver_jax.models.skeleton import Skeleton, take_apart
from deperceiver_jax.sharding import place, state_sharding
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
    initialize: Callable[[], TrainState]  # makes a new run's arrays, on their devices


def plan_train_state(
    build: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    config: ConfigDict,
    schedule: optax.Schedule,
    mesh: Mesh,
) -> Plan:
    """Prepares a TrainState for the detector that `build` makes of random numbers. `config` is `config.optimizer`.

    The abstract and the real state come from the same functions, so a restored state, a new one and one that is only
    compiled for have the same arrays. Raises UserError for a parameter that fits no group.
    """
    detector = over_arrays(shape_of, build(Undrawn()))
    skeleton, params, _ = take_apart(detector)
    multipliers = group_multipliers(params, config.groups)
    optimizer = make_optimizer(config, schedule, multipliers)

    def first_state(trained: dict[str, Array], frozen: dict[str, Array]) -> TrainState:
        ema = {path: jnp.copy(x) for path, x in trained.items()} if config.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), ema)

    def arrays_of(detector: nnx.Module) -> tuple[dict[str, Array], dict[str, Array]]:
        _, params, others = take_apart(detector)
        trained = {path: x for path, x in params.items() if multipliers[path]}
        return trained, others | {path: x for path, x in params.items() if not multipliers[path]}

    def placed(x, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = jax.eval_shape(first_state, *arrays_of(detector))
    shardings = state_sharding(abstract, mesh)

    def initialize() -> TrainState:
        """The detector's arrays are drawn by every host, see initializers.py; the rest is made where it stays."""
        arrays = jax.tree.map(place, arrays_of(build(nnx.Rngs(seed))), (shardings.params, shardings.frozen))
        # This program runs once, so on CPUs it is not worth optimising.
        quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(first_state, out_shardings=shardings, compiler_options=quick)(*arrays)

    return Plan(skeleton, optimizer, jax.tree.map(placed, abstract, shardings), initialize)


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
            path: place(np.array(arrays[path], x.dtype), x.sharding) if path in arrays else x for path, x in old.items()
        }

    return state._replace(params=replace(state.params), frozen=replace(state.frozen), ema=replace(state.ema))


def count_parameters(state: TrainState) -> tuple[int, int]:
    """(numbers in trained parameters, numbers that are frozen)."""
    return sum(x.size for x in state.params.values()), sum(x.size for x in state.frozen.values())

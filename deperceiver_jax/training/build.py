"""The one place where a config and a mesh become what trains: the plan of the state, the loss and the jitted step."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.losses.set_loss import check_loss, set_loss
from deperceiver_jax.models import build_detector
from deperceiver_jax.training.optimizer import learning_rate_schedule
from deperceiver_jax.training.train_state import Plan, plan_train_state
from deperceiver_jax.training.train_step import Loss, TrainStep, make_train_step


class Training(NamedTuple):
    """What a run trains with."""

    plan: Plan
    schedule: optax.Schedule
    loss: Loss
    step: TrainStep


def build_training(
    config: ConfigDict,
    mesh: Mesh,
    *,
    steps_per_epoch: int,
    num_steps: int,
    detector: Callable[[nnx.Rngs], nnx.Module] | None = None,
    loss: Loss | None = None,
) -> Training:
    """From the whole config. The schedule depends on the two numbers; `num_steps` is the last step's.

    detector, loss: take the place of what the config describes, for tests and benchmarks. Raises UserError for a
    config that cannot be trained.
    """
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    detector = detector or (lambda rngs: build_detector(config, rngs=rngs))
    plan = plan_train_state(detector, config.seed, config.optimizer, schedule, mesh)
    check_loss(config)
    classification = build_classification(config.loss)
    loss = loss or functools.partial(set_loss, classification=classification, config=config, mesh=mesh)
    return Training(plan, schedule, loss, make_train_step(plan, config, loss=loss, schedule=schedule, mesh=mesh))

"""One optimiser step as a pure function: (state, batch) -> (state, metrics)."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models.layers.by_platform import target_platform, traced_for
from deperceiver_jax.sharding import ALL_DEVICES, batch_sharding, check_batch_size, gather, replicated
from deperceiver_jax.structures import Batch, Predictions
from deperceiver_jax.training.optimizer import global_norm
from deperceiver_jax.training.train_state import Plan, TrainState

Metrics = dict[str, Float[Array, ""]]

TrainStep = jax.stages.Wrapped  # (TrainState, Batch) -> (TrainState, Metrics)


class Loss(Protocol):
    """set_loss with its settings bound. `whole` is the batch that normalises the terms when `batch` is a part of it."""

    def __call__(self, predictions: Predictions, batch: Batch, *, whole: Batch) -> tuple[Float[Array, ""], Metrics]: ...


def make_train_step(plan: Plan, config: ConfigDict, *, loss: Loss, schedule: optax.Schedule, mesh: Mesh) -> TrainStep:
    """The jitted step for `config` (the whole one). It compiles once for every size of image, and consumes its state.

    Metrics are scalars: `loss` (the weighted total), every named term, `grad_norm` (before clipping), `update_norm`
    (of what is added to the parameters) and `lr`. Where all are finite, so is the new state.
    Dropout depends on (config.seed, state.step) alone, so a resumed run draws what it would have drawn.
    """
    parts = config.optimizer.accumulate_steps
    check_parts(config.data.batch_size, parts, mesh)

    @traced_for(mesh)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_of_part(params: dict[str, Array], part: Batch, part_index: int | Array):
            detector = plan.skeleton.merge(gather({**state.frozen, **params}, mesh))
            image, pixel_valid = normalize_images(part.image, part.size)
            dropout_key = jax.random.fold_in(step_key, part_index)
            predictions = detector(image, pixel_valid, targets=part.targets, dropout_key=dropout_key)
            return loss(predictions, part, whole=batch)

        gradient_of_part = jax.value_and_grad(loss_of_part, has_aux=True)
        if parts == 1:
            (total, terms), gradients = gradient_of_part(state.params, batch, 0)
        else:
            total, terms, gradients = accumulate(gradient_of_part, state.params, split_batch(batch, parts, mesh))
        updates, opt_state = plan.optimizer.update(gradients, state.opt_state, state.params)
        # Without the barrier XLA computes each update twice, to add it and for its norm, and compiles it twice.
        updates = jax.tree.map(jax.lax.optimization_barrier, updates)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, params, config.optimizer.ema_decay)
        norms = {"grad_norm": global_norm(gradients), "update_norm": global_norm(updates)}
        metrics = {"loss": total, **terms, **norms, "lr": schedule(state.step)}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, state.frozen, opt_state, ema), metrics

    shardings = jax.tree.map(lambda x: x.sharding, plan.abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def check_parts(batch_size: int, parts: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets equally many images of every part of a batch."""
    field = "config.data.batch_size"
    check_at_least(field, batch_size, 1)
    if parts < 1:
        raise UserError(f"config.optimizer.accumulate_steps is {parts}; it must be at least 1.")
    if parts > 1:
        if batch_size % parts:
            raise UserError(
                f"{field} is {batch_size}, which config.optimizer.accumulate_steps {parts} does not divide."
            )
        field += " / config.optimizer.accumulate_steps"
    check_batch_size(batch_size // parts, mesh, field=field)


def split_batch(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [parts, B / parts, ...]: part p holds examples p, p + parts, ..., so none changes its device."""

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, ALL_DEVICES)))

    return jax.tree.map(split, batch)


def accumulate(gradient_of_part: Callable, params: dict[str, Array], parts: Batch):
    """(total, terms, gradients) of a batch whose parts are gone through one after the other.

    Losses and gradients of the parts add up, because each part is already normalised by the totals of the whole batch;
    the other terms but counts are averaged.
    """
    count = parts.image.shape[0]

    def add_part(carry, part_and_index):
        (total, terms), gradients = gradient_of_part(params, *part_and_index)
        return jax.tree.map(jnp.add, carry, (total, gradients)), terms

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    # XLA compiles convolutions inside a loop to slow code for CPUs, so there the loop is written out.
    unroll = (target_platform() or jax.default_backend()) == "cpu"
    (total, gradients), terms = jax.lax.scan(add_part, start, (parts, jnp.arange(count)), unroll=unroll)
    added = ("loss", "surplus")
    terms = {name: x.sum() if name.startswith(added) else x.mean() for name, x in terms.items()}
    return total, terms, gradients


def moving_average(ema: dict[str, Array], params: dict[str, Array], decay: float) -> dict[str, Array]:
    """decay * ema + (1 - decay) * params, for the parameters that have an average."""
    return {path: decay * average + (1.0 - decay) * params[path] for path, average in ema.items()}


def non_finite_term(metrics: Mapping[str, float]) -> str | None:
    """The first term that is infinite or not a number: single terms before their sum, the norms last."""
    last = ("loss", "grad_norm", "update_norm")
    names = [name for name in metrics if name not in last] + [name for name in last if name in metrics]
    return next((name for name in names if not math.isfinite(metrics[name])), None)

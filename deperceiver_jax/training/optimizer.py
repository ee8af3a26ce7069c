"""AdamW or Muon, with DETR's parameter groups, clipping and schedules.

Source: DETR (arXiv:2005.12872). The update is PyTorch's AdamW: decay decoupled from the gradient, scaled by the
learning rate, and on every trained parameter, biases and norms included. Parameters are dicts keyed by "/"-joined path.

Muon (Jordan et al., 2024, github.com/KellerJordan/Muon) moves matrices by their momentum with all singular values made
alike, and the rest as AdamW. Its moves are about as large as Adam's are (Moonlight, arXiv:2502.16982, section 2.2), so
rates and weight decay of the one are of use for the other.
"""

import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from deperceiver_jax.errors import UserError, check_at_least, check_choice, check_fraction
from deperceiver_jax.models.heads.heads import CLASS_HEAD
from deperceiver_jax.sharding import SMALLEST_SPLIT

LAST_STEP = 2**31 - 1  # that an int32 counts
OPTIMIZERS = ("adamw", "muon")
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of a matrix's move at a rate of 1 where all its singular values are alike


def group_multipliers(paths: Iterable[str], groups: ConfigDict) -> dict[str, float]:
    """The learning-rate multiplier of each parameter: that of the one group whose pattern its path matches.

    Raises UserError that names the first parameter which no group or more than one matches.
    """
    for name, group in groups.items():
        check_at_least(f"config.optimizer.groups.{name}.multiplier", group.multiplier, 0)
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise UserError(
                f"config.optimizer.groups.{name}.pattern is {group.pattern!r}, which is no regular expression: {error}."
            ) from None
    multipliers = {}
    for path in sorted(paths):
        names = [name for name, group in groups.items() if re.search(group.pattern, path)]
        if len(names) != 1:
            found = f"both {' and '.join(names)} match" if names else f"none of {', '.join(groups)} matches"
            raise UserError(f"config.optimizer.groups: every parameter needs exactly one group, but {found} {path}.")
        multipliers[path] = float(groups[names[0]].multiplier)
    return multipliers


def learning_rate_schedule(config: ConfigDict, *, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    """Step number (from 0) -> the learning rate of a group with multiplier 1. `config` is `config.optimizer`.

    `step`: multiplied by drop_factor from the first step after each of drop_epochs. `cosine`: to 0 at `num_steps`.
    Either rises linearly over the first warmup_steps, of which the first already moves.
    """
    check_choice("config.optimizer.schedule", config.schedule, ("step", "cosine"))
    for name in ("learning_rate", "drop_factor", "warmup_steps"):
        check_at_least(f"config.optimizer.{name}", config[name], 0)
    for epoch in config.drop_epochs:
        check_at_least("config.optimizer.drop_epochs", epoch, 0)
    if config.schedule == "step":
        drops = {min(epoch * steps_per_epoch, LAST_STEP): config.drop_factor for epoch in config.drop_epochs}
        decayed = optax.piecewise_constant_schedule(config.learning_rate, drops)
    else:
        rise = config.warmup_steps
        cosine = optax.cosine_decay_schedule(config.learning_rate, max(num_steps - rise, 1))

        def decayed(step):
            return cosine(jnp.maximum(step - rise, 0))

    if not config.warmup_steps:
        return decayed
    return lambda step: decayed(step) * jnp.minimum((step + 1) / config.warmup_steps, 1.0)


def global_norm(arrays: Mapping[str, Array]) -> Float[Array, ""]:
    """The Euclidean norm of all numbers of all arrays.

    Small arrays are summed in a row: XLA takes nearly as long to compile a sum for each as for all the rest of an
    update. Large ones, which a copy would cost something and which may be split, have sums of their own.
    """
    small = [x.ravel() for x in arrays.values() if x.size < SMALLEST_SPLIT]
    apart = [x for x in arrays.values() if x.size >= SMALLEST_SPLIT]
    if small:
        apart.append(jnp.concatenate(small))
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in apart))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """PyTorch's clip_grad_norm_: factor min(1, max_norm / (norm + 1e-6)), where Optax's own has no 1e-6."""

    def clip(updates, params=None):
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def scale_by_group(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
    """Each update times its parameter's multiplier; parameters that are not trained may be listed too."""
    return optax.stateless(lambda updates, params: {path: multipliers[path] * u for path, u in updates.items()})


def matrix_axes(path: str, shape: tuple[int, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's inputs and outputs; None for what is no matrix, or a class head's.

    Kernels of linear layers are matrices, those of convolutions with all their inputs in a row, and stacked layers
    (layer_stack.py) one each. A convolution of every channel on its own mixes nothing.
    """
    if not path.endswith("/kernel") or CLASS_HEAD in path or (len(shape) > 3 and shape[-2] == 1):
        return None
    stacked, last = len(shape) % 2, len(shape) - 1
    return MuonDimensionNumbers(reduction_axis=tuple(range(stacked, last)), output_axis=last)


def scale_by_muon_or_adam(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon's directions for matrices, as large as PyTorch's with match_rms_adamw, and those of `adam` for the rest."""

    def kinds(params):
        return {path: "adam" if matrix_axes(path, x.shape) is None else "muon" for path, x in params.items()}

    def axes(matrices):  # where others stood is an empty node
        return jax.tree_util.tree_map_with_path(lambda path, x: matrix_axes(path[0].key, x.shape), matrices)

    def to_size(updates, params=None):
        def scaled(path, update):
            numbers = matrix_axes(path[0].key, update.shape)
            inputs = math.prod(update.shape[axis] for axis in numbers.reduction_axis)
            return update * (MUON_RMS * math.sqrt(max(inputs, update.shape[-1])))

        return jax.tree_util.tree_map_with_path(scaled, updates)

    muon = optax.chain(scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=axes), optax.stateless(to_size))
    return optax.partition({"muon": muon, "adam": adam}, kinds)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
    """clip -> Adam or Muon -> + weight_decay * parameter -> * multiplier -> * -schedule.

    `config` is `config.optimizer`.
    """
    check_choice("config.optimizer.name", config.name, OPTIMIZERS)
    for name in ("weight_decay", "eps", "clip_norm"):
        check_at_least(f"config.optimizer.{name}", config[name], 0)
    for name in ("b1", "b2", "ema_decay"):
        check_fraction(f"config.optimizer.{name}", config[name])
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale_by_muon_or_adam(adam) if config.name == "muon" else adam,
        optax.add_decayed_weights(config.weight_decay),
        scale_by_group(multipliers),
        optax.scale_by_learning_rate(schedule),
    )

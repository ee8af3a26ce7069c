"""When a run ends, evaluates and saves, in finished steps."""

from collections.abc import Callable

from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError


def last_step(config: ConfigDict, steps_per_epoch: int) -> int:
    """The step after which a run ends: num_steps, or else num_epochs. `config` is `config.train`. Raises UserError."""
    if config.num_steps < 0 or (config.num_steps == 0 and config.num_epochs < 1):
        raise UserError(
            f"config.train.num_steps is {config.num_steps} and num_epochs {config.num_epochs}: nothing to train."
        )
    if config.log_every < 1:
        raise UserError(f"config.train.log_every is {config.log_every}; it must be at least 1.")
    return config.num_steps or config.num_epochs * steps_per_epoch


def due(config: ConfigDict, field: str, steps_per_epoch: int, num_steps: int) -> Callable[[int], bool]:
    """Whether eval_every or checkpoint_every (`field`) asks for something after a step; the last one always counts.

    A number of steps; 0: after every epoch; -1: only after the last step. Raises UserError for any other number.
    """
    if config[field] < -1:
        raise UserError(f"config.train.{field} is {config[field]}; it can be a number of steps, 0 or -1.")
    every = {0: steps_per_epoch, -1: num_steps}.get(config[field], config[field])
    return lambda step: step % every == 0 or step == num_steps

"""When a run ends, evaluates and saves, in finished steps."""

from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError, check_at_least

LEARNED = 0.9  # AP50 on the few images of a run with config.train.overfit, above which they count as learned


def last_step(config: ConfigDict, steps_per_epoch: int) -> int:
    """The step after which a run ends: num_steps, or else num_epochs. `config` is `config.train`. Raises UserError."""
    if config.num_steps < 0 or (config.num_steps == 0 and config.num_epochs < 1):
        raise UserError(
            f"config.train.num_steps is {config.num_steps} and num_epochs {config.num_epochs}: nothing to train."
        )
    for name in ("overfit", "patience"):
        check_at_least(f"config.train.{name}", config[name], 0)
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


def ends_early(config: ConfigDict, evaluations: Sequence[Mapping[str, float]]) -> str:
    """Why a run ends before its last step, as a clause; "" where it goes on. `config` is `config.train`.

    evaluations: their lines of metrics.jsonl, so a run that continues decides what it would have decided.
    """
    if config.overfit and evaluations and evaluations[-1]["AP50"] > LEARNED:
        return "the images are learned"
    if config.patience and evaluations:
        best = max(evaluations, key=lambda row: row["AP"])  # the first of equal ones
        since = sum(row["step"] > best["step"] for row in evaluations)
        if since >= config.patience:
            plural = "s" if since > 1 else ""
            return f"AP, {best['AP']:.3f} after step {best['step']}, has not risen in {since} evaluation{plural}"
    return ""

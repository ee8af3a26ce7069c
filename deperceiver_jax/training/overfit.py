"""Training on a few pictures until they are known by heart: what that tells in minutes of data, model, loss and rates.

A detector that cannot learn eight pictures will learn no more from eight thousand. Nothing here generalises: there is
no augmentation, no dropout and no average of the parameters, and the learning rate never falls.
"""

import numpy as np
from ml_collections import ConfigDict

from deperceiver_jax.data import Source
from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.training.diagnosis import Circumstances, Rows, because, likely_reason
from deperceiver_jax.training.timetable import LEARNED

STEPS = 1000  # at most, where config.train.num_steps does not say
EVAL_EVERY = 50  # steps
LOG_EVERY = 10  # steps, at most
OVERFIT = "overfit"  # what the evaluations are called in metrics.jsonl


def few_pictures(source: Source, count: int) -> Source:
    """`count` of the pictures that have a target, spread evenly over the split. Raises UserError for too few."""
    useful = np.unique(source.all_targets()[0])
    if len(useful) < count:
        raise UserError(
            f"config.train.overfit is {count}, but only {len(useful)} of the training split's {len(source)} images "
            "have a box to learn."
        )
    return source.take(useful[np.linspace(0, len(useful) - 1, count).round().astype(int)])


def train_on_few(config: ConfigDict) -> None:
    """Makes `config`, the whole one, that of a run on config.train.overfit pictures; model, loss and rate stay."""
    data, optimizer, train = config.data, config.optimizer, config.train
    check_at_least("config.train.overfit", train.overfit, 0)
    part = max(data.batch_size // max(optimizer.accumulate_steps, 1), 1)
    data.batch_size = min(data.batch_size, train.overfit)
    optimizer.accumulate_steps = data.batch_size // part if data.batch_size % part == 0 else 1
    data.flip_probability = data.crop_probability = 0.0
    data.paste_objects = 0
    data.scales, data.max_size = (data.eval_scale,), data.eval_max_size
    data.buckets = data.eval_buckets = 1
    _no_dropout(config.model)
    optimizer.schedule, optimizer.drop_epochs, optimizer.ema_decay = "step", (), 0.0
    train.num_steps = train.num_steps or STEPS
    train.log_every = min(train.log_every, LOG_EVERY)
    train.eval_every, train.checkpoint_every = min(EVAL_EVERY, train.num_steps), -1
    train.patience = 0
    config.eval.batch_size = data.batch_size


def overfit_verdict(known: Circumstances, rows: Rows, evaluations: Rows) -> str:
    """What such a run has shown, at its end. `rows` and `evaluations` are its lines of metrics.jsonl."""
    step, score = evaluations[-1]["step"], evaluations[-1]["AP50"]
    count = known.config.train.overfit
    images = f"the {count} images" if count > 1 else "the image"
    measured = f"AP50 is {score:.3f} on {images} after {step} steps"
    if score > LEARNED:
        return f"Learned: {measured}."
    unknown = " Rates, loss weights, queries, backbone and the boxes' sizes do not explain it: are the boxes right?"
    return f"Not learned: {measured}, not above {LEARNED}.{because(likely_reason(known, rows)) or unknown}"


def _no_dropout(section: ConfigDict) -> None:
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            _no_dropout(value)
        elif name == "dropout":
            section[name] = 0.0

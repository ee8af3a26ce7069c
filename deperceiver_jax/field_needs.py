"""Fields of a config that have an effect only with some values of others.

Whoever sets one that has none would wait for a result in vain, so the command line refuses it and says which other
field would give it one. A detector's own fields are in its `needs`; see models/detector.py.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from deperceiver_jax.errors import UserError


class Need(NamedTuple):
    """When a field has an effect."""

    holds: Callable[[ConfigDict], bool]  # of the whole config
    remedy: str  # what to set for it to have one


def equal(field: str, value: object) -> Need:
    """An effect while `field` is `value`."""
    return Need(lambda config: _value(config, field) == value, f"config.{field}={value}")


def at_least(field: str, least: int) -> Need:
    """An effect while the number in `field` is at least `least`."""
    return Need(lambda config: _value(config, field) >= least, f"config.{field} of at least {least}")


def _value(config: ConfigDict, field: str) -> Any:
    return operator.attrgetter(field)(config)


def _classification(*names: str) -> Need:
    return Need(
        lambda config: config.loss.classification in names and config.loss.weight_class > 0,
        f"config.loss.classification={' or '.join(names)} and config.loss.weight_class above 0",
    )


_CROPS = Need(lambda config: config.data.crop_probability > 0, "config.data.crop_probability above 0")
_FILES = Need(lambda config: not config.data.name.startswith("shapes"), "config.data.name=coco_directory")
_PRETRAINED = Need(  # what init_from brings has a backbone, and published ones have no group norm
    lambda config: not config.init_from and config.model.backbone.norm == "frozen_batch_norm",
    "config.init_from= and config.model.backbone.norm=frozen_batch_norm",
)
_VIEWS = Need(
    lambda config: bool(config.eval.flip or config.eval.scales or config.eval.tiles.size),
    "config.eval.flip=True, config.eval.scales or config.eval.tiles.size",
)
_FOLDER = equal("data.name", "coco_directory")
_COCO = Need(
    lambda config: _FOLDER.holds(config) and config.data.layout in ("auto", "coco"),
    "config.data.name=coco_directory and config.data.layout=coco",
)
GENERAL: Mapping[str, Need] = {
    **dict.fromkeys(("data.directory", "data.exif_orientation"), _FILES),
    **{f"data.{split}_{part}": _COCO for split in ("train", "val") for part in ("annotations", "images")},
    **dict.fromkeys(("data.layout", "data.val_share", "data.split_seed"), _FOLDER),
    **{f"data.crop_{part}": _CROPS for part in ("scales", "min", "max")},
    "data.paste_max_side": at_least("data.paste_objects", 1),
    "loss.no_object_weight": _classification("softmax_no_object"),
    "loss.focal_alpha": _classification("sigmoid_focal", "sigmoid_iou_aware"),
    "loss.focal_gamma": _classification("sigmoid_focal", "sigmoid_iou_aware"),
    "eval.tiles.overlap": at_least("eval.tiles.size", 1),
    "eval.merge_iou": _VIEWS,
    "model.backbone.weights": _PRETRAINED,
    "optimizer.drop_epochs": equal("optimizer.schedule", "step"),
    "optimizer.drop_factor": equal("optimizer.schedule", "step"),
    "train.num_epochs": equal("train.num_steps", 0),
    "train.patience": Need(lambda config: config.train.eval_every >= 0, "config.train.eval_every of 0 or more"),
}


def check_needs(config: ConfigDict, fields: Iterable[str], needs: Mapping[str, Need]) -> None:
    """Raises UserError for the first of `fields`, which a person has set, that has no effect in `config`."""
    for field in fields:
        if field in needs and not needs[field].holds(config):
            raise UserError(f"config.{field} has no effect here; it would have one with {needs[field].remedy}.")

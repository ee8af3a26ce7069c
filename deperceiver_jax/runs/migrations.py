"""How stored runs of earlier versions are read: what became of their config's fields and of their parameters' names.

A stored config says which version wrote it; one that does not say is older than 0.2.0. What a field did that is gone
can only be opened where the field was at rest.
"""

import copy
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deperceiver_jax import __version__
from deperceiver_jax.errors import UserError


class Migration(NamedTuple):
    """What changed between a version and the one before it."""

    version: str
    change: Callable[[dict], None]  # of a stored config, in place


def migrate(stored: dict, origin: object) -> dict:
    """A stored config, with its version, as this version would have stored it, without. `origin` is where it lies.

    Raises UserError for one of a later version, and for one whose fields cannot be carried over.
    """
    config = copy.deepcopy(stored)
    version = config.pop("version", "0.1.0")
    if _number(version) > _number(__version__):
        raise UserError(f"{origin} was written by version {version}, which is later than this one, {__version__}.")
    for migration in MIGRATIONS:
        if _number(version) < _number(migration.version):
            try:
                migration.change(config)
            except KeyError as error:
                raise UserError(f"{origin} is not a whole config: it lacks {error.args[0]}.") from None
            except UserError as error:
                raise UserError(f"{origin}: {error}") from None
    return config


def renamed_paths(paths: Iterable[str]) -> dict[str, str]:
    """{path of a stored parameter: what it is called now}, for those of `paths`, all of a detector's, that changed."""
    paths = list(paths)
    # 0.2.0: SMCA's further levels are projections like the others, behind them.
    projections = {match[1] for path in paths if (match := re.match(r"levels/projections/(\d+)/", path))}
    renamed = {}
    for path in paths:
        if match := re.fullmatch(r"levels/halvings/(\d+)/(.*)", path):
            renamed[path] = f"levels/projections/{len(projections) + int(match[1])}/{match[2]}"
    return renamed


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _drop(section: dict, name: str, at_rest: object) -> None:
    """Takes a field out that had no effect while it was `at_rest`. Raises UserError for another value."""
    value = section.pop(name, at_rest)
    if value != at_rest:
        raise UserError(f"its field {name} is {value!r}, which no version since 0.2.0 can do; version 0.1.0 opens it.")


def _to_0_2_0(config: dict) -> None:
    loss, model = config["loss"], config["model"]
    data = config["data"]
    data.update(exif_orientation="annotated", allow_changed=False, layout="auto", val_share=0.2, split_seed=0)
    data.update(paste_objects=0, paste_max_side=32.0)
    for split in ("train", "val"):  # what was the default is found by its name
        for part, name in (("annotations", f"annotations/instances_{split}2017.json"), ("images", f"{split}2017")):
            data[f"{split}_{part}"] = "" if data[f"{split}_{part}"] == name else data[f"{split}_{part}"]
    config["train"].update(overfit=0, patience=0, trackers=[])
    views: dict = {"flip": False, "scales": [], "tiles": {"size": 0, "overlap": 0.25}, "merge_iou": 0.6}
    config["eval"].update(views)
    denoising = {"copies": loss.pop("hint_copies", 0), "noise": loss.pop("hint_noise", 0.4)}
    _drop(loss, "proposal_repeats", 1)
    if model["name"] == "deperceiver_plus":
        model["denoising"] = denoising
    if model["name"] == "deformable_detr":
        model.update(neck="none", neck_layers=3)
    if model["name"] == "detr":
        model["strides"] = [model.pop("stride")]
    if model["name"] == "deperceiver":
        levels, encoder = model.pop("levels", {}), model["encoder"]
        model["level_dim"] = levels.pop("embed_dim", 4)
        _drop(levels, "embedding", "concat")
        _drop(levels, "group_norm", False)
        _drop(model, "read_tokens", False)
        if encoder["num_cross_attentions"] == 1:
            encoder.pop("share_cross_attentions", None)  # nothing to share
        _drop(encoder, "share_cross_attentions", False)
        model["decoder"].pop("query_scale", None)  # of parameters that exist by now
    model["backbone"].update(groups=1, inner_ratio=1, deformable_stages=0)


def _to_0_2_1(config: dict) -> None:
    if config["model"]["name"] == "deperceiver_plus":
        config["model"].setdefault("box_deltas", "logits")  # the last days of 0.2.0 stored it


def _to_0_2_2(config: dict) -> None:
    config["optimizer"]["name"] = "adamw"


def _to_0_2_3(config: dict) -> None:
    if config["model"]["name"] == "deperceiver_plus":
        config["model"]["decoder"]["look_forward_twice"] = False


MIGRATIONS = (
    Migration("0.2.0", _to_0_2_0),
    Migration("0.2.1", _to_0_2_1),
    Migration("0.2.2", _to_0_2_2),
    Migration("0.2.3", _to_0_2_3),
)

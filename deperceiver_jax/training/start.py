"""How a run begins: its first state, and its first line."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from deperceiver_jax.data import Source
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.field_needs import GENERAL
from deperceiver_jax.files import is_bucket
from deperceiver_jax.models.heads.heads import CLASS_HEAD
from deperceiver_jax.runs.checkpoint_files import require_same_arrays
from deperceiver_jax.runs.stored_detector import find_detector, load_params
from deperceiver_jax.runs.workdir import CONFIG, read_config
from deperceiver_jax.training.diagnosis import untrained_backbone
from deperceiver_jax.training.train_state import Plan, TrainState, count_parameters, replace_arrays
from deperceiver_jax.weights.backbone import find_backbone, load_backbone


def settle_backbone_weights(config: ConfigDict, workdir: Path, given: bool) -> None:
    """Empties config.model.backbone.weights, which published configs name, where something else makes it void.

    given: whether the command names it. Where it does not, a run in `workdir` that began without any goes on so.
    """
    stored = workdir / CONFIG
    begun = not given and stored.is_file() and not read_config(stored).model.backbone.weights
    if begun or not GENERAL["model.backbone.weights"].holds(config):
        config.model.backbone.weights = ""


def find_start(config: ConfigDict) -> None:
    """Looks up, and fetches where it is on the hub, what a new run starts from: before data are prepared.

    Raises UserError for what is not there.
    """
    if config.init_from:
        find_detector(config.init_from)
    elif config.model.backbone.weights:
        file = find_backbone(config.model.backbone.weights)
        if not is_bucket(file) and not file.exists():
            raise UserError(f"config.model.backbone.weights is {file}, where nothing is.")


def first_state(plan: Plan, config: ConfigDict, classes: ClassMap) -> TrainState:
    """New parameters; over them the backbone of `config.model.backbone.weights`, or all of `config.init_from`.

    With init_from, everything must fit, but for a class head that was trained for other classes: that one starts anew,
    and a line says so. Raises UserError when there is nothing to read, when it does not fit, and when nothing is loaded
    into parts of the backbone that are not trained either.
    """
    weights = config.model.backbone.weights
    if untrained := untrained_backbone(plan, config):
        raise UserError(
            f"Nothing is loaded into {len(untrained)} frozen arrays of the backbone ({untrained[0]} is the first), so "
            "they would stay as they begin, random: load a ResNet (config.model.backbone.weights=FILE or hf://...), "
            "start from a trained detector (config.init_from=DIR or hf://...), train the whole backbone "
            "(config.model.backbone.norm=group_norm and frozen_stages=0), or take configs/small.py, which trains from "
            "nothing."
        )
    if config.init_from:
        stored = find_detector(config.init_from)
        arrays = load_params(stored.items)
        expected = {**plan.abstract.params, **plan.abstract.frozen}
        if reason := other_classes(stored.read_classes(), classes):
            arrays = {path: x for path, x in arrays.items() if CLASS_HEAD not in path}
            expected = {path: x for path, x in expected.items() if CLASS_HEAD not in path}
        require_same_arrays(expected, {path: x.shape for path, x in arrays.items()}, stored.items)
        if jax.process_index() == 0:
            kept = f"all but the class head, which starts anew: {reason}" if reason else "everything"
            print(f"Starting from {stored.items}: {kept}.", flush=True)
        return replace_arrays(plan.initialize(), arrays, origin=str(stored.items))
    if weights:
        shapes = {name: x.shape for name, x in {**plan.abstract.params, **plan.abstract.frozen}.items()}
        arrays = load_backbone(weights, shapes)  # what is wrong with the file is said before anything compiles
        return replace_arrays(plan.initialize(), arrays, origin=weights)
    return plan.initialize()


def other_classes(stored: ClassMap, classes: ClassMap) -> str:
    """Why the class head of a detector for `stored` does not fit `classes`; empty when each of them is in its slot."""
    if stored.num_slots != classes.num_slots:
        return f"it has {stored.num_slots} class slots, and this data has {classes.num_slots}"
    theirs = dict(zip(stored.slots, stored.names, strict=True))
    for slot, name in zip(classes.slots, classes.names, strict=True):
        if slot not in theirs:
            return f"it has no class in slot {slot}, which is {name!r} here"
        if theirs[slot] != name:
            return f"its slot {slot} is {theirs[slot]!r}, and {name!r} here"
    return ""


def describe_run(config: ConfigDict, state: TrainState, source: Source, batches, steps: range) -> str:
    """The first line of a run: what it will do. `batches` is the TrainBatches, `steps` the numbers of its steps."""
    read = batches.steps_per_epoch * config.data.batch_size * source.bytes_per_image / 1e9
    processes = jax.process_count()
    each = f", each of {processes} processes {read / processes:.3g} GB" if processes > 1 else ""
    trained, frozen = count_parameters(state)
    count, device = jax.device_count(), jax.devices()[0]
    sizes = ", ".join(f"{height}x{width}" for height, width in batches.buckets)
    return (
        f"Training {config.model.name} ({(trained + frozen) / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them "
        f"trained) on {count} {device.platform} device{'s' if count > 1 else ''} ({device.device_kind}): "
        f"{len(source)} images of {config.data.name} {config.data.train_split}, batches of {config.data.batch_size} "
        f"in {len(batches.buckets)} size{'s' if len(batches.buckets) > 1 else ''} ({sizes}), "
        f"{batches.steps_per_epoch} steps per epoch, "
        + (f"steps {steps[0]} to {steps[-1]}." if steps else "and nothing left to do.")
        + f" An epoch reads {read:.3g} GB of pictures from the disk{each}."
    )

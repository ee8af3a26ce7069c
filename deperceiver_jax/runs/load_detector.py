"""A trained or imported detector from a directory, ready to use."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.models import abstract_detector, field_needs
from deperceiver_jax.models.skeleton import Skeleton, take_apart
from deperceiver_jax.program.command_line import has_config_file, parse_config
from deperceiver_jax.runs.checkpoint_files import require_same_arrays
from deperceiver_jax.runs.stored_detector import StoredDetector, find_detector, load_params


class LoadedDetector(NamedTuple):
    """A detector in two parts, as the evaluation loop takes it, and what its answers mean."""

    skeleton: Skeleton
    arrays: dict[str, np.ndarray]  # by path; the moving average where one was kept
    config: ConfigDict
    classes: ClassMap


def load_detector(directory: str | Path, checkpoint: str = "latest") -> tuple[nnx.Module, ConfigDict, ClassMap]:
    """(detector, config, classes) from a workdir, a checkpoint step, an output of import_weights or hf://owner/name.

    checkpoint: which one of a workdir: latest, best, or a step. Its moving average is taken where it has one.
    Use: `predictions = detector(*normalize_images(image, size))`.
    Raises UserError for a directory without a detector, and for one whose parameters are not those of its config.
    """
    stored = find_detector(directory, checkpoint)
    loaded = load_stored(stored, stored.read_config())
    detector = loaded.skeleton.merge(jax.device_put(loaded.arrays))  # jnp.asarray would compile a program a shape
    return detector, loaded.config, loaded.classes


def load_stored(stored: StoredDetector, config: ConfigDict) -> LoadedDetector:
    """The detector that `config` describes, with the parameters that `stored` points at. Raises UserError."""
    classes = stored.read_classes()
    config.model.num_classes = classes.num_slots
    skeleton, params, others = take_apart(abstract_detector(config))
    arrays = load_params(stored.items)
    require_same_arrays({**params, **others}, {path: array.shape for path, array in arrays.items()}, stored.items)
    return LoadedDetector(skeleton, arrays, config, classes)


def load_for_command(
    workdir: str | None, weights: str | None, checkpoint: str, config_arguments: Sequence[str]
) -> tuple[StoredDetector, LoadedDetector]:
    """What eval.py and predict.py work with: the detector of a workdir, or of `weights`, with its own stored config.

    config_arguments: the command line's `--config...`: overrides of the stored config, or another config file with its
      overrides. Raises UserError.
    """
    if workdir is not None and weights is not None:
        raise UserError("--workdir and --weights are both given; take one of them.")
    if workdir is None and weights is None:
        raise UserError(
            "Either --workdir or --weights is needed: a run, or the output of import_weights, or hf://owner/name."
        )
    stored = find_detector(workdir or weights or "", checkpoint)
    own = None if has_config_file(config_arguments) else stored.read_config()
    return stored, load_stored(stored, parse_config(config_arguments, own, needs=field_needs))

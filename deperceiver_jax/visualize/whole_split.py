"""The split that a picture is about, and what a detector answers to all of its images, in one pass."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from deperceiver_jax.data import Source, open_source
from deperceiver_jax.data.batches.loader import Images
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.evaluation.evaluate import Answer, detect_split, make_detect_step
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.runs.stored_detector import StoredDetector
from deperceiver_jax.sharding import make_mesh, replicated
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize.output import check_output, need


class Subject(NamedTuple):
    """The detector, and the images that it is asked of."""

    stored: StoredDetector
    loaded: LoadedDetector
    source: Source
    title: str  # of the picture: the detector, the data set and how many images


def open_subject(values: flags.FlagValues, config_arguments: Sequence[str]) -> Subject:
    """What `define_split_flags` and `--config...` say. Raises UserError, also for an output that cannot be written."""
    need(values, "output")
    check_output(values.output)
    if values.images is not None:
        check_at_least("--images", values.images, 1)
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    split = values.split or loaded.config.data.eval_split
    source = open_source(loaded.config.data, split)
    require_same_classes(loaded.classes, str(stored.items), source.classes, f"the data set's split {split}")
    if values.images is not None and values.images < len(source):
        source = source.take(np.linspace(0, len(source) - 1, values.images).round().astype(int))
    title = f"{loaded.config.model.name} on {len(source)} images of {loaded.config.data.name}, {split}"
    return Subject(stored, loaded, source, title)


def answers(
    loaded: LoadedDetector, images: Images, make_answer: Callable[[ConfigDict], Answer], *, least_layers: int = 1
) -> Detections:
    """What the answer that is made for the detector's config keeps of every image. NumPy arrays, an image a row.

    Raises UserError where the decoder has fewer than `least_layers` layers.
    """
    config = loaded.config
    keep_compiled(config.train.compilation_cache)
    mesh = make_mesh(config.mesh.model)
    answer = make_answer(config)

    def checked(predictions, original_size):
        if (layers := len(predictions.logits)) < least_layers:
            raise UserError(
                f"The decoder of this {config.model.name} answers from {layers} layer, and this picture needs "
                f"{least_layers} or more."
            )
        return answer(predictions, original_size)

    step = make_detect_step(loaded.skeleton.merge, config, mesh, checked)
    return detect_split(step, jax.device_put(loaded.arrays, replicated(mesh)), images, config, mesh)

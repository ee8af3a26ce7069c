"""Turns published PyTorch weights into a directory that eval, predict and config.init_from of train take.

    deperceiver import-weights --config=detr:r50 --torch=detr-r50-e632da11.pth --output=DIR

Reads, without PyTorch and without running anything that is in the file: the released .pth of DETR and
Deformable DETR, what the released code of SMCA saves, a Lightning .ckpt of DePerceiver, the safetensors of transformers
for both DETRs, and ResNets of torchvision and timm (then all but the backbone is new). --torch may be a folder that
transformers wrote or a name of the hub, hf://owner/name, too; then config.json decides where no --config is given.
The numbers of latents and queries are the file's, unless --config.model.num_queries=N asks for more or fewer queries.

A file with other classes: --classes=FILE or --num_classes=N. If the file's class head is not of that many classes, it
starts anew and everything else is kept; queries are copied as far as they go.
"""

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, is_bucket, is_folder, make_folder, reason, require_writable
from deperceiver_jax.program.command_line import has_config_file, parse_config, parse_flags, run
from deperceiver_jax.runs.workdir import CLASSES, config_text, read_classes

if TYPE_CHECKING:
    from deperceiver_jax.runs.stored_detector import StoredDetector


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "torch", None, "The weights: .pth, .pt, .bin, .ckpt, .safetensors, or hf://owner/name.", flag_values=values
    )
    flags.DEFINE_string("output", None, "The directory to be made.", flag_values=values)
    flags.DEFINE_string("classes", None, "A classes.json; COCO's 91 class slots without it.", flag_values=values)
    flags.DEFINE_integer("num_classes", None, "So many classes without names, instead.", flag_values=values)
    flags.DEFINE_bool(
        "allow_leftovers",
        False,
        "Pass over what the model has no place for, and start anew what the file lacks.",
        flag_values=values,
    )


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    # Not above: they start JAX, which no help text needs.
    from deperceiver_jax.models import field_needs
    from deperceiver_jax.weights.backbone import is_only_a_backbone
    from deperceiver_jax.weights.importing import import_backbone, import_detector, without_wrapper
    from deperceiver_jax.weights.torch_checkpoint import read_state_dict

    for name in ("torch", "output"):
        if values[name].value is None:
            raise UserError(f"--{name} is needed: {values[name].help}")
    output = as_path(values.output)
    require_writable("--output", output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists already.")
    source, stored = find_weights(values.torch)
    if stored and not has_config_file(config_arguments):
        own, own_classes = stored.read_config(), stored.read_classes()
    else:
        own, own_classes = None, None
    config = parse_config(config_arguments, own, needs=field_needs)
    classes = choose_classes(values.classes, values.num_classes, own_classes)
    other_classes = values.classes is not None or values.num_classes is not None

    state = without_wrapper(read_state_dict(source))
    config.model.num_classes = classes.num_slots
    config.model.backbone.weights = config.init_from = ""  # these arrays take their place
    if is_only_a_backbone(state):
        imported = import_backbone(config, state, source)
    else:
        imported = import_detector(
            config,
            state,
            source,
            given=overridden(config_arguments),
            other_classes=other_classes,
            allow_leftovers=values.allow_leftovers,
        )
    write_directory(output, imported.arrays, config, classes)
    print("\n".join(imported.notes))
    print(f"Wrote {output}, {sum(x.size for x in imported.arrays.values()) / 1e6:.1f} M numbers.")


def find_weights(place: str) -> tuple[Path, "StoredDetector | None"]:
    """The file that --torch means, and the detector of which it is in a folder of transformers or on the hub."""
    from deperceiver_jax.runs.stored_detector import find_detector, local_directory
    from deperceiver_jax.weights.hub import WEIGHTS

    source = local_directory(place)
    if not (source / WEIGHTS).is_file():
        return source, None
    return source / WEIGHTS, find_detector(source)


def choose_classes(classes: str | None, num_classes: int | None, own: ClassMap | None = None) -> ClassMap:
    """The class map of --classes or --num_classes, else the file's own, else COCO's. Raises UserError."""
    if classes is not None and num_classes is not None:
        raise UserError("--classes and --num_classes are both given; only one can be.")
    if classes is not None:
        return read_classes(_classes_file(as_path(classes)))
    if num_classes is None:
        return own or ClassMap.from_categories(COCO_CATEGORIES.items())
    if num_classes < 1:
        raise UserError(f"--num_classes is {num_classes}; it must be at least 1.")
    slots = tuple(range(num_classes))
    return ClassMap(slots, tuple(f"class {slot}" for slot in slots), slots, num_classes)


def _classes_file(place: Path) -> Path:
    """A run's own, where a run is named."""
    return place / CLASSES if is_folder(place) else place


def overridden(config_arguments: Sequence[str]) -> set[str]:
    """The fields of config.model that the command line sets, for example {"num_queries"}."""
    return {match[1] for a in config_arguments if (match := re.match(r"--?config\.model\.([^=]+)=", a))}


def write_directory(output: Path, arrays: Mapping[str, np.ndarray], config: ConfigDict, classes: ClassMap) -> None:
    """Makes `output` whole or not at all; in a bucket its config.json comes last. Raises UserError."""
    from deperceiver_jax.runs.stored_detector import save_params

    try:
        if is_bucket(output):
            save_params(output, arrays, config_text(config), classes.to_json())
            return
        make_folder(output.parent)
        with tempfile.TemporaryDirectory(prefix=".import.", dir=output.parent) as partial:
            whole = Path(partial) / "whole"
            save_params(whole, arrays, config_text(config), classes.to_json())
            whole.rename(output)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {reason(error)}.") from None


if __name__ == "__main__":
    sys.exit(run(main))

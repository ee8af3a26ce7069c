"""Writes a trained detector as PyTorch weights, under the names of the official code or of transformers.

    python -m deperceiver_jax.export_weights --workdir=runs/x --checkpoint=best --output=detr.pth
    python -m deperceiver_jax.export_weights --weights=DIR --output=model.safetensors --layout=hugging_face

PyTorch need not be installed. Where a run kept a moving average, that is what is written. import_weights reads the
file back to the same bits.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from deperceiver_jax.command_line import parse_flags, run
from deperceiver_jax.errors import UserError
from deperceiver_jax.load import load_for_command
from deperceiver_jax.training.workdir import flat_fields
from deperceiver_jax.weights.name_rules import to_torch, with_copies
from deperceiver_jax.weights.tables import LAYOUTS, WRAPPERS, official_buffers
from deperceiver_jax.weights.torch_writer import ENDINGS, write_state_dict

# Fields of config.model that the published code has no switch for, or not by name of a parameter: with another value
# it loads the weights, or some, and computes something else.
FIXED_IN_PUBLISHED_CODE = {
    "deperceiver": {
        "no_object_logit": True,
        "relative_boxes": False,
        "read_tokens": False,
        "backbone.norm": "frozen_batch_norm",
        "position.encoding": "sine",
        "position.use": "add",
        "levels.embedding": "concat",
        "encoder.num_blocks": 3,
        "encoder.layers_per_block": 6,
        "encoder.share_blocks": True,
        "encoder.num_cross_attentions": 1,
        "encoder.cross_heads": 1,
        "encoder.self_heads": 8,
        "encoder.gated_mlp": False,
        "decoder.self_attention_value": "query",
        "decoder.residual": "none",
        "decoder.cross_heads": 1,
        "decoder.self_heads": 1,
    },
    "detr": {
        "no_object_logit": True,
        "backbone.norm": "frozen_batch_norm",
        "position.encoder": "attention",
        "position.decoder": "attention",
        "decoder.query_position": "attention",
    },
    "deformable_detr": {
        "no_object_logit": False,
        "backbone.norm": "frozen_batch_norm",
        "encoder.across_levels": True,
        "places": "cells",
    },
    "smca": {
        "no_object_logit": True,
        "backbone.norm": "frozen_batch_norm",
        "decoder.num_heads": 8,
        "decoder.modulation": "multi_head",
        "decoder.scale_form": "inverse",
        "decoder.stride_factor": True,
        "decoder.scale_selection": True,
    },
}


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "The run whose detector is written.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "Of the workdir: latest, best, or a step.", flag_values=values)
    flags.DEFINE_string("weights", None, "Instead of a workdir: an output of import_weights.", flag_values=values)
    flags.DEFINE_string("output", None, f"The file to be written: {' or '.join(ENDINGS)}.", flag_values=values)
    flags.DEFINE_enum(
        "layout", "official", ["official", "hugging_face"], "Whose names the arrays get.", flag_values=values
    )


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    if values.output is None:
        raise UserError(f"--output is needed: {values['output'].help}")
    output = Path(values.output).expanduser()
    if output.suffix not in ENDINGS:
        raise UserError(f"--output: {output} is to end in {' or '.join(ENDINGS)}.")
    if output.exists():
        raise UserError(f"--output: {output} exists already.")
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config, name = loaded.config, loaded.config.model.name
    if name not in LAYOUTS[values.layout]:
        raise UserError(f"--layout: {values.layout} has no names for {name}.")

    rules = LAYOUTS[values.layout][name](config.model)
    state = with_copies(to_torch(loaded.arrays, rules), rules)
    if values.layout == "official":
        state |= official_buffers(config)
    write_state_dict(output, state, wrapper=WRAPPERS[name])
    print(f"Wrote {output}: {len(state)} arrays of {stored.items} under {values.layout} names.")
    for field, here, there in differences(config):
        print(f"The published code computes otherwise: config.model.{field} is {here!r} here and {there!r} there.")
    print(f"Its {loaded.classes.num_slots} class slots are named by {stored.directory}/classes.json.")


def differences(config: ConfigDict) -> list[tuple[str, object, object]]:
    """(field, its value, the published code's) where this model is one that the published code cannot compute."""
    fields = flat_fields(config.model)
    fixed = FIXED_IN_PUBLISHED_CODE[config.model.name]
    return [(field, fields[field], value) for field, value in fixed.items() if fields[field] != value]


if __name__ == "__main__":
    sys.exit(run(main))

"""Writes a trained detector as PyTorch weights, under the names of the official code or of transformers.

    deperceiver export-weights --workdir=runs/x --checkpoint=best --output=detr.pth
    deperceiver export-weights --weights=DIR --output=model.safetensors --layout=hugging_face

PyTorch need not be installed. Where a run kept a moving average, that is what is written. import-weights reads the
file back to the same bits.
"""

import sys

from absl import flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, require_writable
from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_detector_flags
from deperceiver_jax.weights.torch_writer import ENDINGS, write_state_dict


def define_flags(values: flags.FlagValues) -> None:
    define_detector_flags(values)
    flags.DEFINE_string("output", None, f"The file to be written: {' or '.join(ENDINGS)}.", flag_values=values)
    flags.DEFINE_enum(
        "layout", "official", ["official", "hugging_face"], "Whose names the arrays get.", flag_values=values
    )


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    # Not above: they start JAX, which no help text needs.
    from deperceiver_jax.runs.load_detector import load_for_command
    from deperceiver_jax.weights.name_rules import to_torch, with_copies
    from deperceiver_jax.weights.tables import LAYOUTS, WRAPPERS, official_buffers
    from deperceiver_jax.weights.tables.published_code import differences

    if values.output is None:
        raise UserError(f"--output is needed: {values['output'].help}")
    output = as_path(values.output)
    if output.suffix not in ENDINGS:
        raise UserError(f"--output: {output} is to end in {' or '.join(ENDINGS)}.")
    require_writable("--output", output)
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


if __name__ == "__main__":
    sys.exit(run(main))

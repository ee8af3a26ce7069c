"""Trains a detector, evaluates it on the way, and continues where an earlier run of the same command stopped.

    deperceiver train --config=deperceiver:r50_16 --workdir=runs/x --config.data.directory=/data/coco

--config is the name of a shipped config or a Python file, and a variant of it; --config.a.b=value changes a field.
SIGTERM and Ctrl-C save and leave; the same command goes on from there. On several machines, give each the same command
(docs/devices.md). In a clone, `python train.py` is the same.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run
from deperceiver_jax.program.flags import define_process_flags
from deperceiver_jax.program.huge_pages import use_huge_pages


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Where the run lives; continued if it is there.", flag_values=values)
    flags.DEFINE_integer(
        "stopped_status",
        0,
        "Exit status of a run that SIGTERM or Ctrl-C stopped, for engines that start again what has failed.",
        flag_values=values,
        lower_bound=0,
        upper_bound=255,
    )
    define_process_flags(values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.training.train import train  # not above: it starts JAX, which no help text needs

    if train(values, config_arguments) and values.stopped_status:
        raise SystemExit(values.stopped_status)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(run(main))

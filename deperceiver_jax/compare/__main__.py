"""Compares evaluated runs of one data set: a table here, and compare.html with curves, classes and sizes.

    deperceiver compare runs/a runs/b [runs/c ...] [--published=detr,smca] [--median_of_last=10]

Differences are to the first run, with 95 % intervals from drawing the split's images anew. Runs of one config that
differ in their seed are one row with its standard deviation.
"""

import sys

from absl import flags

from deperceiver_jax.errors import UserError, check_at_least
from deperceiver_jax.files import as_path, require_file, require_readable
from deperceiver_jax.program.command_line import parse_flags, run, split_arguments
from deperceiver_jax.report import require_libraries


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_list("published", [], "Families whose published rows are shown, too.", flag_values=values)
    flags.DEFINE_integer("median_of_last", 0, "Median over so many last evaluations.", flag_values=values)
    flags.DEFINE_integer("bootstrap", 200, "Draws for the intervals; 0 leaves them out.", flag_values=values)
    flags.DEFINE_string("output", "compare.html", "The page to write.", flag_values=values)


def main(argv: list[str]) -> None:
    places, others = split_arguments(argv[1:], define_flags)
    folders = [as_path(place) for place in places]
    values, rest = parse_flags([argv[0], *others], define_flags, __doc__)
    if rest[1:]:
        raise UserError(f"{rest[1]}: a comparison takes no config; each run has its own.")
    if len(folders) < 2:
        raise UserError("Runs are missing: name two workdirs or more, as in runs/a runs/b.")
    for name in ("median_of_last", "bootstrap"):
        check_at_least(f"--{name}", values[name].value, 0)
    output = require_file("--output", values.output, (".html",))
    require_libraries("A comparison")
    for folder in folders:
        require_readable("A run", folder)
    from deperceiver_jax.compare.compare import compare  # not above: it takes a second, which no help text needs

    compare(folders, values, output)


if __name__ == "__main__":
    sys.exit(run(main))

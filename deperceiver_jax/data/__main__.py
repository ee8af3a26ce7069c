"""Looks at pictures and annotations before a model is trained on them.

    deperceiver data check DIR [--decode] [--sheet=contact_sheet.png]

DIR is in any layout that train.py reads (docs/own_pictures.md). What is in it, what a run would stop with, what
config.data would suit it, and a sheet of pictures as the loader makes them, augmented and with their boxes. Status 1
when a run would stop. --decode reads all pixels, too. --config=FILE:VARIANT and --config.data.a=value are those of the
run to be; without a file it is DePerceiver+'s. Nothing is prepared.
"""

import os
import shutil
import sys
from pathlib import Path

from absl import flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import require_writable
from deperceiver_jax.program.command_line import has_config_file, parse_config, parse_flags, run

DEFAULT_CONFIG = "deperceiver_plus"


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("decode", False, "Read all pixels of all pictures.", flag_values=values)
    flags.DEFINE_string("sheet", "contact_sheet.png", "Where the sheet of pictures goes.", flag_values=values)


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        parse_flags([argv[0], "--help"], define_flags, __doc__)
    if argv[1:2] != ["check"]:
        raise UserError("deperceiver data does one thing: check DIR; --help shows how.")
    places = [argument for argument in argv[2:] if not argument.startswith("-")]
    if len(places) != 1:
        raise UserError("check needs one folder: deperceiver data check DIR.")
    rest = [argument for argument in argv[2:] if argument.startswith("-")]
    values, config_arguments = parse_flags([argv[0], *rest], define_flags, __doc__)
    from deperceiver_jax.models import field_needs  # not above: it starts JAX, which no help text needs

    if not has_config_file(config_arguments):
        config_arguments.insert(1, f"--config={DEFAULT_CONFIG}")
    config = parse_config([*config_arguments, f"--config.data.directory={places[0]}"], needs=field_needs)
    sheet = Path(values.sheet).expanduser()
    require_writable("--sheet", sheet)
    problems = check(config, sheet, decode=values.decode)
    if problems:
        raise UserError(f"a run would stop: {problems[0]}")


def check(config, sheet: Path, *, decode: bool) -> list[str]:
    """Prints what is to be said of config.data.directory, writes the sheet, and returns what a run would stop with."""
    # Not above, as below: they take seconds, which no help text needs.
    from deperceiver_jax.data.checking.check import check_directory
    from deperceiver_jax.data.checking.report import report
    from deperceiver_jax.visualize.contact_sheet import contact_sheet
    from deperceiver_jax.visualize.fonts import readable

    data = config.data
    if data.name != "coco_directory":
        raise UserError(f"config.data.name is {data.name!r}; check looks at folders, which are coco_directory.")
    checked = check_directory(data, decode=decode)
    print("\n".join(report(checked)), flush=True)
    train = checked.splits.get(data.train_split)
    if train is not None and checked.loads:
        try:
            print("\n" + "\n".join(_suggestions(checked, train, config)), flush=True)
            picture = contact_sheet(train.source, data, readable(train.source.classes), seed=config.seed)
        except UserError as error:  # a picture whose header is whole and whose pixels are not
            checked.problems.append(str(error))
        else:
            _save(picture, sheet)
            print(f"\nWrote {sheet}: pictures of split {data.train_split} as the loader makes them, class by class.")
    if checked.problems:
        print("\nA run would stop with")
        print("\n".join(f"- {problem}" for problem in checked.problems), flush=True)
    else:
        print("\nNothing here would stop a run.")
    return checked.problems


def _save(picture, sheet):
    from PIL import Image

    try:
        Image.fromarray(picture).save(sheet)
    except (OSError, ValueError) as error:  # ValueError: a name whose ending is of no kind of picture
        raise UserError(f"--sheet: {sheet} cannot be written: {getattr(error, 'strerror', None) or error}.") from None


def _suggestions(checked, train, config):
    from deperceiver_jax.data.checking.suggestions import (
        images_per_second,
        suggest_boxes,
        suggest_buckets,
        suggest_scale,
    )

    data = config.data
    scale = suggest_scale(train, data)
    suited = data.copy_and_resolve_references()
    suited.update(scale.fields)
    found = [
        ("scale", scale),
        ("padded sizes", suggest_buckets(train, suited)),
        ("boxes", suggest_boxes(train, data, config.model.get("num_queries"))),
    ]
    lines = ["What config.data would suit"]
    for what, suggestion in found:
        lines.append(f"- {what}: {suggestion.why}")
        lines += [f"    '--config.data.{name}={value}'" for name, value in suggestion.fields.items()]
        if not suggestion.fields:
            lines.append("    as it is")
    rate = images_per_second(train, suited)
    place = Path(data.prepared_directory).expanduser()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    needed, free = sum(split.num_bytes for split in checked.splits.values()), shutil.disk_usage(there).free
    lines.append(
        f"- loading: the threads of one process make {rate:.0f} pictures a second at this scale "
        f"({os.cpu_count()} cores; config.data.num_workers={data.num_workers})."
    )
    lines.append(f"- disk: preparing takes {needed / 1e9:.2f} GB in {place}, where {free / 1e9:.0f} GB are free.")
    return lines


if __name__ == "__main__":
    sys.exit(run(main))

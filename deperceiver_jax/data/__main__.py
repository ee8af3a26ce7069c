"""Looks at pictures and annotations before a model is trained on them, and prepares them.

    deperceiver data check DIR [--decode] [--sheet=contact_sheet.png]
    deperceiver data prepare DIR [--to=gs://BUCKET/FOLDER] [--from=gs://BUCKET/FOLDER] [--share=0/4]

check: DIR is in any layout that train.py reads (docs/own_pictures.md). What is in it, what a run would stop with, what
config.data would suit it, and a sheet of pictures as the loader makes them, augmented and with their boxes. Status 1
when a run would stop. --decode reads all pixels, too. Nothing is prepared.

prepare: writes what a run would write at its first start, and with --to copies it to a bucket. On the hosts that shall
train, --from copies it to DIR, which config.data.directory then is; no picture's own file is needed there
(docs/pods.md). The same command goes on where it was cut off.

--config=FILE:VARIANT and --config.data.a=value are those of the run to be; without a file it is DePerceiver+'s.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from absl import flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, check_address
from deperceiver_jax.program.command_line import has_config_file, parse_config, parse_flags, run, split_arguments

DEFAULT_CONFIG = "deperceiver_plus"
KINDS = {"check": ("coco_directory",), "prepare": ("coco_directory", "tfds")}  # config.data.name
FLAGS = {"check": ("decode", "sheet"), "prepare": ("to", "from", "share")}  # of each thing that can be done


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("decode", False, "Read all pixels of all pictures.", flag_values=values)
    flags.DEFINE_string("sheet", "contact_sheet.png", "Where the sheet of pictures goes.", flag_values=values)
    flags.DEFINE_string("to", None, "A folder of a bucket, to copy what is prepared to.", flag_values=values)
    flags.DEFINE_string("from", None, "A folder of a bucket, to copy what was prepared from.", flag_values=values)
    flags.DEFINE_string(
        "share",
        "0/1",
        "With --to or --from, I/N: this is process I, from 0, of N that see the same DIR and copy a range each.",
        flag_values=values,
    )


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        parse_flags([argv[0], "--help"], define_flags, __doc__)
    what = argv[1] if len(argv) > 1 else ""
    if what not in FLAGS:
        raise UserError("deperceiver data does two things: check DIR and prepare DIR; --help shows how.")
    places, rest = split_arguments(argv[2:], define_flags)
    if len(places) != 1:
        raise UserError(f"{what} needs one folder: deperceiver data {what} DIR.")
    check_address(f"{what}'s DIR", places[0], buckets=False)
    values, config_arguments = parse_flags([argv[0], *rest], define_flags, __doc__)
    for name in {*FLAGS["check"], *FLAGS["prepare"]} - {*FLAGS[what]}:
        if values[name].present:
            raise UserError(f"--{name} is none of {what}'s flags, which are --{', --'.join(FLAGS[what])}.")
    from deperceiver_jax.models import field_needs  # not above: it starts JAX, which no help text needs

    if not has_config_file(config_arguments):
        config_arguments.insert(1, f"--config={DEFAULT_CONFIG}")
    name = parse_config(config_arguments, needs=field_needs).data.name
    if name not in KINDS[what]:
        raise UserError(f"config.data.name is {name!r}; {what} looks at folders, which are {' or '.join(KINDS[what])}.")
    config = parse_config([*config_arguments, f"--config.data.directory={places[0]}"], needs=field_needs)
    if what == "prepare":
        prepare(config.data, values)
        return
    from deperceiver_jax.visualize.output import check_output

    problems = check(config, check_output(values.sheet, "--sheet"), decode=values.decode)
    if problems:
        raise UserError(f"a run would stop: {problems[0]}")


def prepare(data, values: flags.FlagValues) -> None:
    """Prepares the splits of a run, or copies them from a bucket. data: config.data. Raises UserError."""
    from deperceiver_jax.data.datasets import bucket_copy

    to, source = values.to, values["from"].value
    share = bucket_copy.Share(*parse_share(values.share))
    if to and source:
        raise UserError("--to and --from are given; what is copied goes one way.")
    if share.processes > 1 and not (to or source):
        raise UserError("--share needs --to or --from: one process prepares, the others wait for it.")
    if source:
        bucket_copy.require_place("--from", as_path(source))
        bucket_copy.download(as_path(source), Path(data.directory).expanduser().absolute(), share)
        return
    if to:
        bucket_copy.require_place("--to", as_path(to))
    from deperceiver_jax.data.datasets.source import open_source

    folders = {}
    for split in dict.fromkeys((data.train_split, data.eval_split)):
        opened = open_source(data, split)
        folders["" if data.name == "tfds" else split] = opened.prepared
        print(f"Split {split}, {len(opened)} images, is prepared in {opened.prepared}.", flush=True)
    if to:
        bucket_copy.upload(folders, as_path(to), share)


def parse_share(text: str) -> tuple[int, int]:
    """(which, of how many) as --share has it. Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--share is {text!r}; it is I/N, the process and how many there are, from 0/N on.")
    return int(found[1]), int(found[2])


def check(config, sheet: Path, *, decode: bool) -> list[str]:
    """Prints what is to be said of config.data.directory, writes the sheet, and returns what a run would stop with."""
    # Not above, as below: they take seconds, which no help text needs.
    from PIL import Image

    from deperceiver_jax.data.checking.check import check_directory
    from deperceiver_jax.data.checking.report import report
    from deperceiver_jax.visualize.contact_sheet import contact_sheet
    from deperceiver_jax.visualize.fonts import readable
    from deperceiver_jax.visualize.output import save_picture

    data = config.data
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
            save_picture(Image.fromarray(picture), sheet, "--sheet")
            print(f"\nWrote {sheet}: pictures of split {data.train_split} as the loader makes them, class by class.")
    if checked.problems:
        print("\nA run would stop with")
        print("\n".join(f"- {problem}" for problem in checked.problems), flush=True)
    else:
        print("\nNothing here would stop a run.")
    return checked.problems


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

"""Command lines of the programs: plain flags, a config file or a stored config, overrides of its fields, and errors.

    --config=configs/deperceiver.py:r50_16   a Python file with `get_config`, and its variant
    --config.data.batch_size=32              an override of one field, of a config file or of a stored config

Every mistake a person can make here becomes a `UserError`; `run` prints its sentence and gives exit status 1.
"""

import copy
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.field_needs import GENERAL, Need, check_needs
from deperceiver_jax.program import processes

_CONFIG_FILE = re.compile(r"^--?config(=.*)?$")
_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)")


def run(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status: 1, with the sentence on stderr, for what a person can mend.

    One of several processes that an error ends leaves from here at once, so that the others end too.
    """
    try:
        main(list(sys.argv if argv is None else argv))
    except (Exception, KeyboardInterrupt) as error:
        processes.leave(error)
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_flags(argv: Sequence[str], define: Callable[[flags.FlagValues], None], usage: str):
    """(flags, rest): the program's own flags, as `define` adds them, and the arguments that are about the config.

    `--help` prints `usage` and the flags, and leaves with status 0.
    """
    values = flags.FlagValues()
    define(values)
    if {"--help", "-h", "-help"} & set(argv):
        print(f"{usage.strip()}\n{values.get_help()}")
        raise SystemExit(0)
    try:
        rest = values(list(argv), known_only=True)
    except flags.Error as error:
        raise UserError(str(error).rstrip(".") + ".") from None
    for argument in rest[1:]:
        if not (_CONFIG_FILE.match(argument) or _OVERRIDE.match(argument)):
            names = [f"--{name}" for name in values] + ["--config"]
            raise UserError(f"There is no flag {argument.split('=')[0]}{_nearest(argument.split('=')[0], names)}.")
        if "=" not in argument and not argument.lstrip("-").startswith("noconfig."):
            raise UserError(f"{argument} needs a value: {argument}=VALUE.")
    return values, rest


def has_config_file(rest: Sequence[str]) -> bool:
    """Whether a config file is given, so that no stored config is needed."""
    return any(_CONFIG_FILE.match(argument) for argument in rest)


def parse_config(
    rest: Sequence[str],
    stored: ConfigDict | None = None,
    *,
    needs: Callable[[ConfigDict], Mapping[str, Need]] = lambda config: GENERAL,
) -> ConfigDict:
    """The resolved config: the file in `rest`, or else `stored`, with the overrides in `rest`. Its fields are locked.

    needs: of a config, those fields that have an effect only with some values of others.
    Raises UserError for a file or a variant that is not there, a field that does not exist, a value of another type,
    and for an override without effect.
    """
    base = _config_file(rest) if has_config_file(rest) else stored
    if base is None:
        raise UserError("--config is missing: a file and its variant, as in --config=configs/deperceiver.py:r50_16.")
    overrides = [argument for argument in rest[1:] if not _CONFIG_FILE.match(argument)]
    fields = list(_fields(base))
    for argument in overrides:
        field = _OVERRIDE.findall(argument)[0]
        if field not in fields:
            raise UserError(f"The config has no field {field}{_nearest(field, fields)}.")
    arguments = [rest[0], *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", copy.deepcopy(base), flag_values=values, sys_argv=arguments)
    config = _parse(values, arguments).config
    check_needs(config, (_OVERRIDE.findall(argument)[0] for argument in overrides), needs(config))
    return config


def _config_file(rest: Sequence[str]) -> ConfigDict:
    """What `get_config` of the last `--config=FILE:VARIANT` returns; it refuses a variant with a ValueError."""
    argument = [argument for argument in rest if _CONFIG_FILE.match(argument)][-1]
    file, colon, variant = argument.split("=", 1)[1].partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config: {file} does not exist.")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {file} has no function get_config.")
    try:
        return module.get_config(*[variant] if colon else []).lock()
    except ValueError as error:
        raise UserError(str(error)) from None


def _parse(values: flags.FlagValues, arguments: Sequence[str]) -> flags.FlagValues:
    try:
        values(list(arguments))
    except flags.Error as error:
        raise UserError(str(error).rstrip(".") + ".") from None
    return values


def _fields(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


def _nearest(name: str, names: Sequence[str]) -> str:
    """A suggestion to append, or nothing: fields of the same name elsewhere, or else the name spelt most like it."""
    close = [n for n in names if n.split(".")[-1] == name.split(".")[-1]]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; the nearest is {' or '.join(close)}" if close else ""

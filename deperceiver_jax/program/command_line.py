"""Command lines of the programs: plain flags, a config file or a stored config, overrides of its fields, and errors.

    --config=configs/deperceiver.py:r50_16   a Python file with `get_config`, and its variant
    --config=deperceiver:r50_16              the same, of the configs that are shipped, from anywhere
    --config.data.batch_size=32              an override of one field, of a config file or of a stored config

Every mistake a person can make here becomes a `UserError`; `run` prints its sentence and gives exit status 1.
"""

import contextlib
import copy
import difflib
import gc
import importlib.machinery
import importlib.util
import math
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from deperceiver_jax.errors import UserError
from deperceiver_jax.field_needs import GENERAL, Need, check_needs
from deperceiver_jax.files import bucket_error, check_address

_CONFIG_FILE = re.compile(r"^--?config(=.*)?$")
_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)")
LARGEST_WHOLE = 2**31 - 1  # of any field: what 32 bits hold
COLLECT_AFTER = 10_000  # new objects, not Python's 700: tracing makes them by the million, and hardly any garbage
IN_BUCKETS = (  # flags and fields that may be paths in a bucket
    "--workdir",
    "--weights",
    "--output",
    "--images",
    "--image",
    "--annotations",
    "--torch",
    "--classes",
    "--to",
    "--from",
    "config.data.directory",
    "config.init_from",
    "config.model.backbone.weights",
    "config.train.compilation_cache",
)
HUB_NAMES = ("--weights", "--torch", "config.init_from", "config.model.backbone.weights")  # what hf:// may be given to


def run(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status: 1, with the sentence on stderr, for what a person can mend.

    One of several processes that an error ends leaves from here at once, so that the others end too.
    """
    if gc.get_threshold()[0] < COLLECT_AFTER:
        gc.set_threshold(COLLECT_AFTER)
    try:
        find_home()
        main(list(sys.argv if argv is None else argv))
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and "jax" not in sys.modules:  # a help text, of which head has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if "jax" in sys.modules:  # else there are no others, and JAX would be started for nothing
            from deperceiver_jax.program import processes

            processes.leave(error)
        sentence = str(error) if isinstance(error, UserError) else bucket_error(error) or _lacking_platform(error)
        if not sentence:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def find_home() -> None:
    """Gives a user without a home directory (docker --user, for example) one among temporary files, and says so."""
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir(), f"deperceiver_jax_{os.getuid()}")
        home.mkdir(mode=0o700, exist_ok=True)
        if home.stat().st_uid != os.getuid():
            raise UserError(f"There is no home directory, and {home} is another user's: set HOME.") from None
        os.environ["HOME"] = str(home)
        print(f"warning: there is no home directory (HOME is not set); ~ is {home} now.", file=sys.stderr, flush=True)


def _lacking_platform(error: BaseException) -> str:
    """What to say when `error` is JAX's for a platform that it cannot use here; else nothing."""
    if not isinstance(error, (RuntimeError, AssertionError)) or not os.environ.get("JAX_PLATFORMS"):
        return ""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return (
            f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']}, which JAX cannot use here: no such device, or its part "
            "of JAX is not installed (pip install '.[cuda]' or '.[tpu]'). Without JAX_PLATFORMS it takes what there is."
        )
    return ""


def parse_flags(argv: Sequence[str], define: Callable[[flags.FlagValues], None], usage: str):
    """(flags, rest): the program's own flags, as `define` adds them, and the arguments that are about the config.

    `--help` prints `usage` and the flags, and leaves with status 0.
    """
    values = flags.FlagValues()
    define(values)
    if is_help(argv):
        print(f"{usage.strip()}\n\n{describe_flags(values)}")
        raise SystemExit(0)
    several = {name for name in values if isinstance(values[name], flags.MultiFlag)}
    try:
        rest = values(_repeat_names(argv, several), known_only=True)
    except flags.Error as error:
        raise UserError(str(error).rstrip(".") + ".") from None
    for argument in rest[1:]:
        if not argument.startswith("-"):
            hint = f"; --images={argument} would name a picture" if "images" in several else ""
            raise UserError(f"{argument} belongs to no flag{hint}.")
        if not (_CONFIG_FILE.match(argument) or _OVERRIDE.match(argument)):
            names = [f"--{name}" for name in values] + ["--config"]
            raise UserError(f"There is no flag {argument.split('=')[0]}{nearest(argument.split('=')[0], names)}.")
        if "=" not in argument and not argument.lstrip("-").startswith("noconfig."):
            raise UserError(f"{argument} needs a value: {argument}=VALUE.")
    for name in values:
        value = values[name].value
        for text in value if isinstance(value, list) else [value]:
            _check_text(f"--{name}", text)
    return values, rest


def _repeat_names(argv: Sequence[str], several: Collection[str]) -> list[str]:
    """`--images a b` as `--images=a --images=b`, for flags of several values: a shell writes many for one pattern."""
    arguments, name = [], ""
    for argument in argv:
        if argument.startswith("-") and argument != "-":
            name, equals, _ = argument.lstrip("-").partition("=")
            arguments += [argument] if equals or name not in several else []
        else:
            arguments.append(f"--{name}={argument}" if name in several else argument)
    return arguments


def split_arguments(
    arguments: Sequence[str], define: Callable[[flags.FlagValues], None]
) -> tuple[list[str], list[str]]:
    """(places, flags) of a program that takes places beside the flags that `define` adds: --flag=value, or
    --flag value."""
    values = flags.FlagValues()
    define(values)
    places, others, waiting = list[str](), list[str](), ""
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.lstrip("-")
            others.append(argument)
            of_config = _CONFIG_FILE.match(argument) or _OVERRIDE.match(argument)
            waiting = argument if "=" not in name and (of_config or _takes_value(values, name)) else ""
        elif waiting:
            others[-1], waiting = f"{waiting}={argument}", ""
        else:
            places.append(argument)
    return places, others


def _takes_value(values: flags.FlagValues, name: str) -> bool:
    return name in values and not values[name].boolean


def is_help(arguments: Sequence[str]) -> bool:
    """Whether one of them asks for the help text."""
    return bool({"--help", "-help", "-h"} & set(arguments))


def describe_flags(values: flags.FlagValues) -> str:
    """A line or more for each flag of a program: its name, what it means, and what it is where it is not given."""
    lines = []
    for name in values:
        flag = values[name]
        if name in ("flagfile", "undefok"):  # absl's own
            continue
        given = f"--[no]{name}" if flag.boolean else f"--{name}={name.split('_')[-1].upper()}"
        value = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        default = "" if value in (None, False, "") else f" Without it: {value}."
        text = textwrap.wrap(f"{flag.help}{default}", 88)
        lines += [f"  {start:<30} {line}" for start, line in zip([given] + [""] * len(text), text, strict=False)]
    return "\n".join(["flags:", *lines])


def _check_text(name: str, value: object) -> None:
    """Raises UserError for a text, most likely a path, that no file of this machine can have or that has no home."""
    if not isinstance(value, str):
        return
    if not (value.startswith("hf://") and name in HUB_NAMES):
        check_address(name, value, buckets=name in IN_BUCKETS)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{name} is {value!r}: its bytes are no UTF-8.")
    if value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise UserError(f"{name} is {value}: there is no such home directory.")


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
        raise UserError("--config is missing: a config and its variant, as in --config=deperceiver:r50_16.")
    fields, overrides = list(_fields(base)), dict[str, str]()
    for argument in (argument for argument in rest[1:] if not _CONFIG_FILE.match(argument)):
        field = _OVERRIDE.findall(argument)[0]
        if field not in fields:
            raise UserError(f"The config has no field {field}{nearest(field, fields)}.")
        overrides.pop(field, None)
        overrides[field] = argument  # the last one of a field counts; of a tuple's, ml_collections would add them up
    arguments = [rest[0], *overrides.values()]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", copy.deepcopy(base), flag_values=values, sys_argv=arguments)
    config = _parse(values, arguments).config
    _check_fields(config, base)
    check_needs(config, overrides, needs(config))
    return config


def _check_fields(config: ConfigDict, base: ConfigDict) -> None:
    """Raises UserError for what an override has left no value of its kind: texts, members of tuples, whole sections."""
    before, now = dict(_values(base)), dict(_values(config))
    for field, value in now.items():
        _check_text(f"config.{field}", value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"config.{field} is {number}; only finite numbers are taken.")
            if isinstance(number, int) and abs(number) > LARGEST_WHOLE:
                raise UserError(f"config.{field} has {number}; a whole number is at most {LARGEST_WHOLE}.")
        kinds = {type(member) for member in before.get(field, ())} if isinstance(value, tuple) else ()
        kinds = {int, float} if kinds == {float} else kinds
        if kinds and not all(type(member) in kinds for member in value):
            raise UserError(f"config.{field} is {value!r}; it is to be like {before[field]!r}.")
    for field in sorted(before.keys() - now.keys()):
        if not field.startswith("optimizer.groups."):
            raise UserError(f"The config lacks {field}.")


def _config_file(rest: Sequence[str]) -> ConfigDict:
    """What `get_config` of the last `--config=FILE:VARIANT` returns; it refuses a variant with a ValueError."""
    argument = [argument for argument in rest if _CONFIG_FILE.match(argument)][-1]
    name, colon, variant = argument.split("=", 1)[1].partition(":")
    file = _find_config(name)
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    with _as_configs([file.parent, shipped_configs()] if file.parent.name == "configs" else [shipped_configs()]):
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {file} has no function get_config.")
        try:
            return module.get_config(*[variant] if colon else []).lock()
        except ValueError as error:
            raise UserError(str(error)) from None


def shipped_configs() -> Path:
    """The folder of the shipped configs: inside of the package where that is installed, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    return inside if (inside := package / "configs").is_dir() else package.parent / "configs"


def _find_config(name: str) -> Path:
    """The file that `--config=NAME` means: a path, or else a shipped config, as in detr or configs/detr.py."""
    file = Path(name).expanduser()
    if file.is_file():
        return file
    shipped = {path.stem: path for path in shipped_configs().glob("*.py") if path.stem not in ("__init__", "base")}
    if name.removeprefix("configs/").removesuffix(".py") in shipped:
        return shipped[file.stem]
    if "/" in name or file.suffix:
        raise UserError(f"--config: {name} does not exist.")
    close = nearest(name, sorted(shipped))
    raise UserError(f"--config: there is no config {name}{close}; shipped are {', '.join(sorted(shipped))}.")


@contextlib.contextmanager
def _as_configs(folders: Sequence[Path]) -> Iterator[None]:
    """Makes `from configs.base import base` mean these folders, in a clone, installed, and beside another `configs`."""

    def taken() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "configs"]

    others = {name: sys.modules.pop(name) for name in taken()}
    package = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    package.submodule_search_locations = [str(folder) for folder in folders]
    sys.modules["configs"] = importlib.util.module_from_spec(package)
    try:
        yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(others)


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


def _values(config: ConfigDict, prefix: str = ""):
    """(full name, value) of all fields but sections."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nearest(name: str, names: Sequence[str]) -> str:
    """A suggestion to append, or nothing: fields of the same name elsewhere, or else the name spelt most like it."""
    close = [n for n in names if n.split(".")[-1] == name.split(".")[-1]]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; the nearest is {' or '.join(close)}" if close else ""

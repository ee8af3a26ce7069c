"""DETR-family object detection: train, evaluate and use a detector.

    deperceiver predict --weights=DIR --images=photos --output=out
    deperceiver train --config=detr:r50 --workdir=runs/x --config.data.directory=/data/coco
    deperceiver eval --workdir=runs/x

`deperceiver COMMAND --help` says what a command does and takes. A config is a name and a variant, as detr:r50, or the
path of a Python file; --config.a.b=value changes a field of it.
"""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

from deperceiver_jax import __version__
from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import is_help, nearest, run
from deperceiver_jax.program.huge_pages import use_huge_pages

FIRST = ("predict", "train", "eval")  # of the list; the others follow by name
PROGRAM = "\ndef main(argv: list[str])"  # what a file has that is one


def find_commands() -> dict[str, Path]:
    """The file of every program of this package by its command's name; a folder with a __main__.py is one program."""
    package = Path(__file__).parent
    files = {path.stem: path for path in package.glob("[!_]*.py")}
    files |= {path.parent.name: path for path in package.glob("*/__main__.py")}
    programs = {name.replace("_", "-"): path for name, path in sorted(files.items()) if PROGRAM in path.read_text()}
    return {name: programs[name] for name in FIRST} | programs


def summary(name: str, program: Path) -> str:
    """A command's line of the list: the start of its docstring, which is read without importing anything."""
    start = (ast.get_docstring(ast.parse(program.read_text())) or "").partition("\n\n")[0]
    return textwrap.fill(start, 120, initial_indent=f"  {name:<15} ", subsequent_indent=" " * 18)


def main(argv: list[str]) -> None:
    commands = find_commands()
    name, rest = (argv[1], argv[2:]) if len(argv) > 1 else ("--help", [])
    if is_help([name]):
        lines = [summary(*command) for command in commands.items()]
        print("\n".join([(__doc__ or "").strip(), "", "commands:", *lines]))
    elif name == "--version":
        print(f"deperceiver_jax {__version__}")
    elif name not in commands:
        raise UserError(f"There is no command {name}{nearest(name, list(commands))}; deperceiver --help lists them.")
    else:
        module = ".".join(commands[name].relative_to(Path(__file__).parent.parent).with_suffix("").parts)
        importlib.import_module(module).main([f"deperceiver {name}", *rest])


def command() -> int:
    """What the installed `deperceiver` calls."""
    use_huge_pages()
    return run(main)


if __name__ == "__main__":
    sys.exit(command())

"""Pictures of what a detector finds and of where it looks.

    deperceiver visualize detections --workdir=runs/demo --output=runs/demo/detections.png
    deperceiver visualize attention --workdir=runs/demo --example=0 --output=runs/demo/attention.png
    deperceiver visualize latents --workdir=runs/demo --example=0 --output=runs/demo/latents.png

Each has a --help of its own.
"""

import importlib
import sys

from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import is_help, nearest, run

DRAWN = ("detections", "attention", "latents")


def main(argv: list[str]) -> None:
    if is_help(argv[1:2]):
        print(__doc__.strip())
    elif argv[1:2] and argv[1] in DRAWN:
        importlib.import_module(f"deperceiver_jax.visualize.{argv[1]}").main([f"{argv[0]} {argv[1]}", *argv[2:]])
    else:
        close = nearest(argv[1], DRAWN) if argv[1:2] else ""
        raise UserError(f"visualize draws {', '.join(DRAWN[:-1])} or {DRAWN[-1]}{close}; --help shows how.")


if __name__ == "__main__":
    sys.exit(run(main))

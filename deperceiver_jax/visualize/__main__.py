"""Pictures of what a detector finds and of where it looks.

python -m deperceiver_jax.visualize detections --workdir=runs/demo --output=runs/demo/detections.png
python -m deperceiver_jax.visualize attention --workdir=runs/demo --example=0 --output=runs/demo/attention.png
python -m deperceiver_jax.visualize latents --workdir=runs/demo --example=0 --output=runs/demo/latents.png
"""

import sys

from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize import attention, detections, latents

COMMANDS = {"detections": detections.main, "attention": attention.main, "latents": latents.main}


def main(argv: list[str]) -> None:
    if argv[1:2] in (["--help"], ["-h"]):
        print(__doc__.strip())
    elif argv[1:2] and argv[1] in COMMANDS:
        COMMANDS[argv[1]]([argv[0], *argv[2:]])
    else:
        raise UserError(f"python -m deperceiver_jax.visualize draws: {' or '.join(COMMANDS)}; --help shows how.")


if __name__ == "__main__":
    sys.exit(run(main))

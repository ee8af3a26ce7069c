"""Pictures of what a detector finds and of where it looks, and the figures of the papers, each with one command.

    deperceiver visualize layers --workdir=runs/demo --output=layers.png
    deperceiver visualize attention --weights=DIR --image=photo.jpg --output=attention.png
    deperceiver visualize compare_attention runs/a runs/b --example=5 --output=compared.png

What a run found:
  detections         ground truth beside detections
  small_objects      APs / AP of runs and papers as bars: figure 3 of DePerceiver's paper
What a detector does:
  layers             AP by decoder layer, with and without suppression of doubles: figure 4 of DETR's paper
  queries            every box of each query slot over a data set: its figure 7
  counting           objects found by how many there are, far beyond any training picture: its figure 5
Where it looks in an image:
  encoder            self-attention of chosen points: its figure 3
  attention          what chosen queries look at, head by head: its figure 6
  compare_attention  several runs at one object: figure 3 of SMCA's paper
  latents            where latents sit, and how they move from layer to layer

Memory of encoder and decoder by stride, figure 2 of DePerceiver's paper, needs no run but a clone:
    python benchmarks/encoder_decoder_memory.py --output=runs/memory

`deperceiver visualize NAME --help` says more.
"""

import ast
import importlib
import sys
from pathlib import Path

from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import is_help, nearest, parse_flags, run
from deperceiver_jax.visualize.flags import DRAWN


def main(argv: list[str]) -> None:
    if is_help(argv[1:2]):
        print(__doc__.strip())
    elif argv[1:2] and argv[1] in DRAWN and is_help(argv[2:]):  # read, not imported, which would start JAX
        source = Path(__file__).with_name(f"{argv[1]}.py").read_text()
        parse_flags(["", "--help"], DRAWN[argv[1]], ast.get_docstring(ast.parse(source)) or "")
    elif argv[1:2] and argv[1] in DRAWN:
        importlib.import_module(f"deperceiver_jax.visualize.{argv[1]}").main([f"{argv[0]} {argv[1]}", *argv[2:]])
    else:
        close = nearest(argv[1], list(DRAWN)) if argv[1:2] else ""
        *others, last = DRAWN
        raise UserError(f"visualize draws {', '.join(others)} or {last}{close}; --help shows how.")


if __name__ == "__main__":
    sys.exit(run(main))

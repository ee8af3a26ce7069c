"""Pictures of what a detector finds and of where it looks, and the figures of the papers, each with one command.

What a run found:
    deperceiver visualize detections --workdir=runs/demo --output=detections.png
    deperceiver visualize small_objects runs/a runs/b --published=deperceiver --output=small_objects.png
What a detector does, of a run (--workdir) or of import-weights (--weights):
    deperceiver visualize layers --workdir=runs/demo --output=layers.png
    deperceiver visualize queries --workdir=runs/demo --output=queries.png
    deperceiver visualize counting --workdir=runs/demo --output=counting.png
Where it looks, in --image=photo.jpg or in an example of the data:
    deperceiver visualize attention --workdir=runs/demo --example=0 --output=attention.png
    deperceiver visualize encoder --workdir=runs/demo --example=0 --output=encoder.png
    deperceiver visualize latents --workdir=runs/demo --example=0 --output=latents.png
    deperceiver visualize compare_attention runs/a runs/b --example=0 --output=compared.png
Memory of encoder and decoder by stride, of no run, from a clone:
    python benchmarks/encoder_decoder_memory.py --output=runs/memory

small_objects, APs / AP as bars: figure 3 of DePerceiver's paper; memory: its figure 2
layers, AP by decoder layer with and without suppression; queries, the boxes of each slot over a data set; counting,
objects found by their number; encoder, self-attention of points: figures 4, 7, 5 and 3 of DETR's paper
compare_attention, several runs at one object: figure 3 of SMCA's paper

Each has a --help of its own.
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

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

import importlib
import sys

from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import is_help, nearest, run

DRAWN = (
    "detections",
    "small_objects",
    "layers",
    "queries",
    "counting",
    "attention",
    "encoder",
    "latents",
    "compare_attention",
)


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

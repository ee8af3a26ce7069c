"""`deperceiver train` in a clone: its flags are in deperceiver_jax/train.py, its chapters in training/train.py."""

import sys

from deperceiver_jax.program.command_line import run
from deperceiver_jax.program.huge_pages import use_huge_pages
from deperceiver_jax.train import main

if __name__ == "__main__":
    use_huge_pages()
    sys.exit(run(main))

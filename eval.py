"""`deperceiver eval` in a clone: its flags are in deperceiver_jax/eval.py."""

import sys

from deperceiver_jax.eval import main
from deperceiver_jax.program.command_line import run
from deperceiver_jax.program.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()
    sys.exit(run(main))

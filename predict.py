"""`deperceiver predict` in a clone: its flags are in deperceiver_jax/predict.py."""

import sys

from deperceiver_jax.predict import main
from deperceiver_jax.program.command_line import run

if __name__ == "__main__":
    sys.exit(run(main))

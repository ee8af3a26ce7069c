"""How long a checkpoint takes: the whole state of a detector's run, random numbers in it, saved as a run saves it.

    python benchmarks/checkpoint.py --config=detr:r50 --workdir=/data/x [--times=3]
    python benchmarks/checkpoint.py --config=detr:r50 --workdir=gs://my-bucket/x

A run goes on while a checkpoint is written, once its arrays are copied; both times are told. The rate is what
`deperceiver preflight --scaling --checkpoint_rate` takes.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.files import as_path, require_writable  # noqa: E402
from deperceiver_jax.models import field_needs  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402
from deperceiver_jax.sharding import make_mesh  # noqa: E402
from deperceiver_jax.training.build import build_training  # noqa: E402
from deperceiver_jax.training.checkpoint import Checkpoints  # noqa: E402


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "A new directory, or one in a bucket.", flag_values=values)
    flags.DEFINE_integer("times", 3, "How many checkpoints are saved.", flag_values=values, lower_bound=1)


def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that are not made smaller by compression, as trained ones are not."""
    rng = np.random.default_rng(0)
    if np.issubdtype(leaf.dtype, np.floating):
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), leaf.sharding)
    return jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    config = parse_config(config_arguments, needs=field_needs)
    if not values.workdir:
        raise UserError("--workdir is missing: where the checkpoints shall go.")
    workdir = as_path(values.workdir)
    require_writable("--workdir", workdir)
    plan = build_training(config, make_mesh(), steps_per_epoch=1000, num_steps=1000).plan
    state = jax.tree.map(drawn, plan.abstract)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{config.model.name}: a state of {size / 1e6:.0f} MB")
    for step in range(1, values.times + 1):
        began = time.monotonic()
        with Checkpoints(workdir, keep=1) as checkpoints:
            checkpoints.save(state._replace(step=state.step * step), {})
            going_on = time.monotonic() - began
        seconds = time.monotonic() - began
        print(f"the run goes on after {going_on:.2f} s; saved in {seconds:.2f} s, {size / 1e6 / seconds:.0f} MB/s")


if __name__ == "__main__":
    sys.exit(run(main))

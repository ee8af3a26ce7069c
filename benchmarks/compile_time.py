"""How long the training step compiles for a TPU with rows of layers as loops, and with every layer written out.

    python benchmarks/compile_time.py [--configs=configs/detr.py:r50] [--images=8] [--topology=v5e:2x2] [--config.x=y]

The step is the one that train.py runs and preflight compiles, for images of 832 x 1344, in bfloat16; no TPU is needed,
only libtpu. Processor seconds are of all threads, tracing included, and mean something on a busy machine.

libtpu writes the code of equal operations once. LIBTPU_INIT_ARGS=--xla_jf_hlo_deduplication=false takes that from it.
"""

import functools
import sys
import time
from pathlib import Path
from unittest import mock

import jax
from absl import flags
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deperceiver_jax.models import field_needs  # noqa: E402
from deperceiver_jax.preflight.chips import GIB, open_topology  # noqa: E402
from deperceiver_jax.preflight.nominal import NOMINAL_BOXES  # noqa: E402
from deperceiver_jax.preflight.program import trace_step  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402

BUCKET = (832, 1344)


def define_flags(values: flags.FlagValues) -> None:
    configs = ["configs/deperceiver.py:r50_16", "configs/detr.py:r50"]
    flags.DEFINE_list("configs", configs, "Config files with their variants.", flag_values=values)
    flags.DEFINE_integer("images", 8, "Images a chip.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("topology", "v5e:2x2", "A chip and a shape, or local.", flag_values=values)


def main(argv: list[str]) -> None:
    values, rest = parse_flags(argv, define_flags, __doc__)
    _, devices = open_topology(values.topology)
    print("| step | processor s, loops | written out | ratio | wall s | | ratio | code MiB | | ratio | temp. GiB | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in values.configs:
        config = parse_config(
            [argv[0], f"--config={ROOT / name}", "--config.precision=bfloat16", *rest[1:]], needs=field_needs
        )
        config.data.batch_size = values.images * len(devices)
        loops, written = (compile_once(config, devices, unroll) for unroll in (False, True))
        *pairs, temporaries = zip(loops, written, strict=True)
        cells = " | ".join(compare(*pair) for pair in pairs)
        memory = " | ".join(f"{size:.2f}" for size in temporaries)
        print(f"| {name.removeprefix('configs/')} | {cells} | {memory} |", flush=True)


def compare(loops: float, written: float) -> str:
    """Both and their ratio. XLA's CPU compiler does not say how much code it writes."""
    return f"{loops:.0f} | {written:.0f} | {loops / written:.2f}" if written else "- | - | -"


def compile_once(config: ConfigDict, devices, unroll: bool) -> tuple[float, float, float, float]:
    """(processor seconds, seconds, MiB of code, GiB of temporaries)."""
    processor, wall = time.process_time(), time.perf_counter()
    scan = functools.partial(jax.lax.scan, unroll=True) if unroll else jax.lax.scan
    with mock.patch.object(jax.lax, "scan", scan):
        compiled = trace_step(config, devices, BUCKET, NOMINAL_BOXES).lower().compile()
    seconds = time.process_time() - processor, time.perf_counter() - wall
    print(f"{config.model.name}, unroll {unroll}: {seconds[0]:.0f} s, {seconds[1]:.0f} s", file=sys.stderr, flush=True)
    memory = compiled.memory_analysis()
    return *seconds, memory.generated_code_size_in_bytes / 2**20, memory.temp_size_in_bytes / GIB


if __name__ == "__main__":
    sys.exit(run(main))

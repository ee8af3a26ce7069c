"""Says before a pod is rented whether a run fits it, and how fast a step can be: compiles the real train step for it.

    deperceiver preflight --config=deperceiver:r50_16 --topology=v5e:16x16 \\
        --config.data.batch_size=2048 --config.precision=bfloat16 [--sizes=832x1344] [--bytes] [--suggest] \\
        [--hbm_gib=16] [--scaling] [--worker_rate=140] [--checkpoint_rate=200]

--config.a.b=value changes a field, as for train. No accelerator is needed; for a TPU, only its compiler, libtpu.
--scaling says how the run grows from 4 to 1024 chips with as many images a chip, and where it stops (docs/pods.md).
Buckets are those of the data set, if it is there (config.data.directory); else those of COCO's commonest image sizes.
"""

import sys

from absl import flags

from deperceiver_jax.program.command_line import parse_flags, run


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "topology", "local", "A chip and a shape, as v5e:4x4 or 2xv5e:4x4, or local.", flag_values=values
    )
    flags.DEFINE_float("hbm_gib", 0.0, "Memory of a chip; 0 is the published one.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_list("sizes", [], "Only these padded sizes, HEIGHTxWIDTH.", flag_values=values)
    flags.DEFINE_bool("bytes", False, "List which parts of the package move the bytes.", flag_values=values)
    flags.DEFINE_bool("suggest", False, "Find the largest batch, as it is and rematerialised.", flag_values=values)
    flags.DEFINE_bool("scaling", False, "Reckon 4 to 1024 chips at constant images a chip.", flag_values=values)
    flags.DEFINE_float(
        "worker_rate",
        140.0,
        "Images a second by a loader worker; benchmarks/input_pipeline.py --workers=1 measures it.",
        flag_values=values,
        lower_bound=1.0,
    )
    flags.DEFINE_float(
        "checkpoint_rate",
        200.0,
        "Megabytes a second of a checkpoint; benchmarks/checkpoint.py measures them on a disk or in a bucket.",
        flag_values=values,
        lower_bound=1.0,
    )


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    from deperceiver_jax.preflight.preflight import preflight  # not above: it starts JAX, which no help text needs

    preflight(values, config_arguments)


if __name__ == "__main__":
    sys.exit(run(main))

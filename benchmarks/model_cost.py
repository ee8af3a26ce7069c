"""What a detector costs: parameters, operations of a forward pass, memory of a training step.

    JAX_PLATFORMS=cpu python benchmarks/model_cost.py --config=configs/deformable_detr.py:r50 --size=800x1066 [--memory]

Operations are matrix products and convolutions of one image, counted in the traced program as preflight does; published
GFLOPs count a multiplication with its addition as one, so both counts are printed. Memory is what the compiled train
step of one image reserves on this platform: its temporary arrays, and parameters with their optimiser state. It takes
minutes to compile, and nothing is run.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.models import field_needs  # noqa: E402
from deperceiver_jax.preflight.arithmetic import count_flops  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402
from deperceiver_jax.sharding import make_mesh  # noqa: E402
from deperceiver_jax.training.build import build_training  # noqa: E402
from deperceiver_jax.training.compile_ahead import abstract_batch  # noqa: E402
from deperceiver_jax.training.train_state import Plan, count_parameters, inference_arrays  # noqa: E402

BOX_SLOTS = 64  # of an image, as COCO's fullest need


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("size", "800x1066", "HEIGHTxWIDTH of the image, all of it real.", flag_values=values)
    flags.DEFINE_bool("memory", False, "Compile the train step too.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    config = parse_config(config_arguments, needs=field_needs)
    if not (match := re.fullmatch(r"(\d+)x(\d+)", values.size)):
        raise UserError(f"--size is {values.size}; it is to be like 800x1066.")
    size = (int(match[1]), int(match[2]))
    config.data.batch_size = 1
    mesh = make_mesh(devices=jax.devices()[:1])
    plan, _, _, train_step = build_training(config, mesh, steps_per_epoch=1000, num_steps=1000)

    trained, frozen = count_parameters(plan.abstract)
    print(f"{config.model.name}, {size[0]} x {size[1]} pixels, {config.precision}, {mesh.devices.flat[0].platform}")
    print(f"parameters: {(trained + frozen) / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained")
    operations = forward_operations(plan, size)
    print(f"a forward pass: {operations / 2e9:.1f} G multiply-adds, {operations / 1e9:.1f} GFLOPs", flush=True)
    if values.memory:
        temporary, arguments = step_memory(plan, train_step, size)
        print(f"a training step: {temporary / 2**30:.2f} GiB, and {arguments / 2**30:.2f} GiB of state and batch")


def forward_operations(plan: Plan, size: tuple[int, int]) -> int:
    """Multiplications and additions of all matrix products and convolutions for one image."""
    image, pixel_valid = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), jax.ShapeDtypeStruct((1, *size), bool)

    def forward(arrays, image, pixel_valid):
        return plan.skeleton.merge(arrays)(image, pixel_valid)

    # As a GPU computes it: a CPU reads points with products, which the published figures leave out.
    return count_flops(jax.make_jaxpr(forward)(inference_arrays(plan.abstract), image, pixel_valid), "cuda")


def step_memory(plan: Plan, train_step, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes of the compiled train step for one image: (temporary arrays, what it is given)."""
    batch = abstract_batch(1, size, BOX_SLOTS, None)
    memory = train_step.lower(plan.abstract, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


if __name__ == "__main__":
    sys.exit(run(main))

"""What spatial modulation costs: SMCA's decoder forwards and backwards, with it and as DETR's.

    JAX_PLATFORMS=cpu python benchmarks/modulation.py
    JAX_PLATFORMS=cpu python benchmarks/modulation.py --variant=r50_multiscale --rounds=3

The memory is that of an image of --height x --width pixels, the loss the sum of squares of what the decoder answers,
dropout is on. Both ways take turns, so that other work on the machine slows both; the fastest of --rounds counts, by
the clock and, what other work changes less, by processor time. Bytes are what the compiled program needs besides its
inputs and results.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import smca  # noqa: E402
from deperceiver_jax.models.features.pyramid import make_level_tokens  # noqa: E402
from deperceiver_jax.models.features.tokens import feature_valid, size_in_cells  # noqa: E402
from deperceiver_jax.models.layers.compute import Compute  # noqa: E402
from deperceiver_jax.models.smca.spatial_modulation import ModulationFields  # noqa: E402
from deperceiver_jax.models.smca.transformer import ModulatedDecoder  # noqa: E402

VARIANT = flags.DEFINE_string("variant", "r50_single_scale", "Of configs/smca.py.")
BATCH = flags.DEFINE_integer("batch", 2, "Images.")
HEIGHT = flags.DEFINE_integer("height", 800, "Pixels.")
WIDTH = flags.DEFINE_integer("width", 1088, "Pixels.")
QUERIES = flags.DEFINE_integer("queries", 300, "Queries.")
LAYERS = flags.DEFINE_integer("layers", 6, "Decoder layers.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Steps of each way.")


def make_step(strides: tuple[int, ...], **changes):
    """(the compiled step, its arguments) of a decoder whose config fields are changed so."""
    model = smca.get_config(VARIANT.value).model
    model.decoder.update(num_layers=LAYERS.value, **changes)
    fields = ModulationFields(**model.decoder)
    how = dict(dropout=model.dropout, compute=Compute(jnp.float32, "auto", rematerialize=False), rngs=nnx.Rngs(0))
    decoder = ModulatedDecoder(model.embed_dim, QUERIES.value, fields, strides=strides, **how)
    graphdef, state = nnx.split(decoder)
    sizes = [(-(-HEIGHT.value // stride), -(-WIDTH.value // stride)) for stride in strides]
    maps = [jnp.zeros((BATCH.value, *size, model.embed_dim)) for size in sizes]
    pixel_valid = jnp.ones((BATCH.value, HEIGHT.value, WIDTH.value), bool).at[:, :, -1].set(False)
    valid = [feature_valid(pixel_valid, *size) for size in sizes]
    image = make_level_tokens(maps, valid, size_in_cells(pixel_valid, strides))
    tokens, position = jax.random.normal(jax.random.key(0), (2, *image.tokens.shape))
    image_size = jnp.full((BATCH.value, 2), 1.0) * jnp.asarray([WIDTH.value, HEIGHT.value])[None]

    def loss(state, tokens, position, key):
        memory = image.replace(tokens=tokens, position=position)
        decoded, center = nnx.merge(graphdef, state)(memory, image_size, dropout_key=key)
        return jnp.sum(decoded**2) + (0.0 if center is None else jnp.sum(center**2))

    arguments = (state, tokens, position, jax.random.key(1))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile(), arguments


def main(_) -> None:
    model = smca.get_config(VARIANT.value).model
    strides = (*model.strides, *(model.strides[-1] * 2 ** (i + 1) for i in range(model.extra_levels)))
    ways = {"without": make_step(strides, modulation="none"), "with": make_step(strides)}
    clocks = {"ms": time.perf_counter, "CPU ms": time.process_time}
    fastest = {unit: dict.fromkeys(ways, float("inf")) for unit in clocks}
    for number in range(ROUNDS.value + 1):
        for name, (step, arguments) in ways.items():
            start = {unit: clock() for unit, clock in clocks.items()}
            jax.block_until_ready(step(*arguments))
            if number:  # the first call warms up
                for unit, clock in clocks.items():
                    fastest[unit][name] = min(fastest[unit][name], 1e3 * (clock() - start[unit]))
    megabytes = {name: step.memory_analysis().temp_size_in_bytes / 1e6 for name, (step, _) in ways.items()}
    print(f"{VARIANT.value}: {LAYERS.value} layers, {QUERIES.value} queries")
    print(f"{BATCH.value} images of {HEIGHT.value} x {WIDTH.value}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("\n| | without | with | ratio |\n|---|---|---|---|")
    for unit, values in {**fastest, "MB": megabytes}.items():
        print(f"| {unit} | {values['without']:.0f} | {values['with']:.0f} | {values['with'] / values['without']:.3f} |")


if __name__ == "__main__":
    app.run(main)

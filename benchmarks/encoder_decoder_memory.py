"""Figure 2 of the DePerceiver paper: memory of the encoder-decoder for one image, DETR's beside DePerceiver's.

    JAX_PLATFORMS=cpu python benchmarks/encoder_decoder_memory.py --output=runs/memory [--compile] [--topology=v5e:2x2]

For every stride, and for the two sizes 800 x 800 (the paper's) and 800 x 1333:

- outputs: numbers that matrix products write in one forward pass, millions, which is what the paper plots (see PAPER);
- kept: MiB that the forward pass keeps for the backward pass, parameters not counted, as JAX's differentiation finds it
  (nothing is run or compiled);
- compiled (--compile): MiB of temporaries of the compiled forward and backward pass, of this machine's platform or of a
  TPU that need not be there (--topology, with libtpu). Of what a TPU's compiler refuses: what it says it would need.

DePerceiver+ is measured beside them. All come plain, with memory-efficient attention (in blocks of queries; for a TPU
our kernels), and with that and rematerialised layers. Float32, batch 1, no dropout. Writes OUTPUT/memory.json, and
OUTPUT/memory.png with matplotlib (pip install '.[plots]'); --rows draws again from such a file.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from jax.extend.core import ClosedJaxpr  # noqa: E402

from configs import deperceiver, deperceiver_plus, detr  # noqa: E402
from deperceiver_jax.models import build_detector  # noqa: E402
from deperceiver_jax.models.deperceiver_plus.denoising import AttentionMask  # noqa: E402
from deperceiver_jax.models.features.pyramid import LevelTokens, make_level_tokens  # noqa: E402
from deperceiver_jax.models.features.tokens import flatten_map, size_in_whole_cells  # noqa: E402
from deperceiver_jax.models.layers.layer_stack import apply_rematerialized  # noqa: E402
from deperceiver_jax.preflight.arithmetic import count  # noqa: E402
from deperceiver_jax.preflight.chips import open_topology  # noqa: E402
from deperceiver_jax.preflight.program import needed_bytes  # noqa: E402

STRIDES = {"32": (32,), "16": (16,), "8": (8,), "multi-scale": (8, 16, 32), "4": (4,)}
SIZES = ((800, 800), (800, 1333))
KINDS = {  # config.rematerialize
    "plain": False,
    "memory-efficient attention": False,
    "rematerialised layers": True,
}
# Millions of numbers in the paper's figure 2 at 800 x 800, read from its drawing; DETR had no memory for the last.
PAPER = {
    "DETR": {"32": 40, "16": 377, "8": 5097},
    "DePerceiver": {"32": 187, "16": 190, "8": 202, "multi-scale": 206},
}
WIDTH, LATENTS = 256, 1024  # as the paper's figure; so are the configs' 100 queries
CONFIGS = {
    "DETR": (detr, "r50"),
    "DePerceiver": (deperceiver, "r50_16"),
    "DePerceiver+": (deperceiver_plus, "r50_multiscale"),  # with its 300 latents and their heads
}
MODELS = tuple(CONFIGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/memory"))
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SIZES, help="such as 800x800")
    parser.add_argument("--strides", nargs="+", choices=STRIDES, default=list(STRIDES))
    parser.add_argument("--compile", action="store_true", help="also compile, for minutes")
    parser.add_argument("--topology", default="", help="compile for this TPU topology, such as v5e:2x2")
    parser.add_argument("--rows", type=Path, help="a memory.json: measure nothing, judge and draw that")
    arguments = parser.parse_args()
    if arguments.rows:
        rows = json.loads(arguments.rows.read_text())
    else:
        device = compile_for(arguments.topology) if arguments.compile or arguments.topology else None
        rows = []
        for size, stride, model, kind in itertools.product(arguments.sizes, arguments.strides, MODELS, KINDS):
            rows.append(measure(model, kind, size, stride, device))
            print(line(rows[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    for figure in figures(rows)[1:]:
        for text in judge(rows, figure):
            print(text)
    draw(rows, arguments.output / "memory.png")


def parse_size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def figures(rows: list[dict]) -> list[str]:
    return ["outputs", "kept", *(["compiled"] if "compiled" in rows[0] else [])]


def compile_for(topology: str):
    """The device to compile for: a described TPU, or this machine's first."""
    return open_topology(topology or "local")[1][0]


# -------------------------------------------------------------------------------------------------------- measuring


def level_sizes(size: tuple[int, int], stride: str) -> list[tuple[int, int]]:
    return [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES[stride]]


def count_tokens(size: tuple[int, int], stride: str) -> int:
    return sum(map(math.prod, level_sizes(size, stride)))


def encoder_decoder(model: str, kind: str, platform: str) -> nnx.List:
    """(encoder, decoder) with abstract parameters; of DePerceiver+ the neck's blocks, the start and the decoder."""
    file, variant = CONFIGS[model]
    config = file.get_config(variant)
    attention = "xla" if kind == "plain" else "flash" if platform == "tpu" else "chunked"
    config.update(attention=attention, rematerialize=KINDS[kind])
    config.model.dropout = 0.0
    if model == "DePerceiver":
        config.model.encoder.num_latents = LATENTS

    def build():
        detector = build_detector(config, rngs=nnx.Rngs(0))
        if model == "DePerceiver+":
            return nnx.List([detector.levels.blocks, detector.start, detector.decoder])
        return nnx.List([detector.encoder, detector.decoder])

    return nnx.eval_shape(build)


def measure(model: str, kind: str, size: tuple[int, int], stride: str, device=None) -> dict:
    """One row of the table; see the top of the file."""
    graphdef, params = nnx.split(encoder_decoder(model, kind, device.platform if device else "cpu"))
    tokens = count_tokens(size, stride)
    x = jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.float32)

    def apply(params, x):
        parts = nnx.merge(graphdef, params)
        map_valid = [jnp.ones((1, *level), bool) for level in level_sizes(size, stride)]
        maps = [jnp.zeros((*valid.shape, 1)) for valid in map_valid]
        image = make_level_tokens(maps, map_valid, size_in_whole_cells(map_valid)).replace(tokens=x)
        if model == "DePerceiver+":
            neck, start, decoder = parts
            x = through_neck(neck, image, map_valid)
            image = image.replace(tokens=x, position=x)
            begin = functools.partial(apply_rematerialized, start) if KINDS[kind] else start
            proposals, content, boxes = begin(image, None)
            return decoder(content, boxes, image, AttentionMask()), proposals
        encoder, decoder = parts
        return decoder(encoder(x, x, image.valid), x, image.valid) if model == "DETR" else decoder(encoder(image))

    kept = jax.eval_shape(lambda *inputs: jax.vjp(apply, *inputs)[1], params, x)
    row = dict(model=model, kind=kind, size=size, stride=stride, tokens=tokens)
    row["outputs"] = matrix_outputs(jax.make_jaxpr(apply)(params, x)) / 1e6
    row["kept"] = _mebibytes(without(jax.tree.leaves(kept), jax.tree.leaves(params)))
    if device is not None:
        step = jax.grad(lambda *inputs: sum(jnp.sum(y**2) for y in jax.tree.leaves(apply(*inputs))), argnums=(0, 1))
        row |= compile_step(step, params, x, device)
    return row


def through_neck(neck: nnx.List, image: LevelTokens, map_valid: list):
    """The tokens of all levels after their maps' blocks."""
    maps = zip(neck, image.maps(image.tokens), map_valid, strict=False)
    return jnp.concatenate([flatten_map(blocks(x, valid)) for blocks, x, valid in maps], axis=1)


def compile_step(step, params, x, device) -> dict:
    """The compiled figures of a row."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    lowered = jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(params, x)
    try:
        temporaries, refused = lowered.compile().memory_analysis().temp_size_in_bytes, False
    except jax.errors.JaxRuntimeError as error:
        temporaries, refused = needed_bytes(str(error)), True
        if temporaries is None:
            raise
    return dict(compiled=temporaries / 2**20, refused=refused, platform=device.device_kind)


def matrix_outputs(jaxpr: ClosedJaxpr) -> int:
    """Numbers that matrix products and convolutions write; a loop's body counts as often as it runs."""
    return count(jaxpr, "cpu", lambda equation: sum(math.prod(v.aval.shape) for v in equation.outvars))


def without(arrays: list, parameters: list) -> list:
    """`arrays` without one of the shape and type of each parameter: a backward pass keeps parameters as they are."""
    left = [(x.shape, x.dtype) for x in parameters]
    kept = []
    for x in arrays:
        if (x.shape, x.dtype) in left:
            left.remove((x.shape, x.dtype))
        else:
            kept.append(x)
    return kept


def _mebibytes(arrays: list) -> float:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) / 2**20


# ------------------------------------------------------------------------------------------------------------ report


def line(row: dict) -> str:
    compiled = f"  compiled {row['compiled']:9.0f} MiB" if "compiled" in row else ""
    compiled += " (refused)" if row.get("refused") else ""
    return (
        f"{row['size'][0]}x{row['size'][1]}  {row['stride']:12}{row['tokens']:7} tokens  {row['model']:14}"
        f"{row['kind']:28} outputs {row['outputs']:9.1f} M  kept {row['kept']:9.0f} MiB{compiled}"
    )


def judge(rows: list[dict], figure: str) -> list[str]:
    """Who needs less by one figure, and how straight the DePerceivers' are against tokens."""
    texts = []
    found = {(*r["size"], r["stride"], r["model"], r["kind"]): r[figure] for r in rows}
    for place in dict.fromkeys(key[:3] for key in found):
        best = {model: min(found[*place, model, kind] for kind in KINDS) for model in MODELS}
        plain = found[*place, "DETR", "plain"]
        for ours in MODELS[1:]:
            texts.append(
                f"{place[0]}x{place[1]} stride {place[2]}, {figure}: {ours}'s best {best[ours]:.0f} MiB is "
                f"{best[ours] / plain:.3f} of DETR's plain {plain:.0f} and {best[ours] / best['DETR']:.3f} of its best "
                f"{best['DETR']:.0f}."
            )
    for ours, kind in itertools.product(MODELS[1:], KINDS):
        points = [(r["tokens"], r[figure]) for r in rows if (r["model"], r["kind"]) == (ours, kind)]
        texts.append(f"{ours}, {kind}: {figure} against tokens is a line with R^2 = {r_squared(points):.5f}.")
    return texts


def r_squared(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y)."""
    x, y = np.array(points, np.float64).T
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - np.sum(residual**2) / np.sum((y - y.mean()) ** 2))


LABELS = {
    "outputs": "numbers written by matrix products, millions",
    "kept": "kept for the backward pass, MiB",
    "compiled": "temporaries of the compiled step, MiB",
}


def draw(rows: list[dict], path: Path) -> None:
    """Every figure at each stride, on a logarithmic scale."""
    try:
        import matplotlib
    except ImportError:
        print("No figure: matplotlib is missing (pip install '.[plots]').")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({tuple(row["size"]) for row in rows})
    shape = (len(sizes), len(figures(rows)))
    sheet, axes = pyplot.subplots(
        *shape, figsize=(6.2 * shape[1], 4.4 * shape[0]), layout="constrained", squeeze=False, sharex=True
    )
    styles = dict(zip(KINDS, ("-", "--", ":"), strict=True))
    colors = dict(zip(MODELS, ("C1", "C0", "C2"), strict=True))
    strides = list(dict.fromkeys(row["stride"] for row in rows))
    for (i, size), (j, name) in itertools.product(enumerate(sizes), enumerate(figures(rows))):
        ax = axes[i][j]
        # With blocks and rematerialisation matrix products write as much, or a little padding more.
        for model, kind in itertools.product(MODELS, KINDS if name != "outputs" else ("plain",)):
            here = {r["stride"]: r[name] for r in rows if (r["model"], r["kind"], *r["size"]) == (model, kind, *size)}
            values = [here[stride] for stride in strides]
            ax.plot(strides, values, styles[kind], marker="o", color=colors[model], label=f"{model}, {kind}")
        if name == "outputs" and size == (800, 800):
            for model, known in PAPER.items():
                points = [(stride, known[stride]) for stride in strides if stride in known]
                label = "the paper's figure" if model == "DETR" else None
                ax.plot(*zip(*points, strict=True), "x", color="black", markersize=9, label=label)
        ax.set(title=f"{size[0]} x {size[1]}", ylabel=LABELS[name], xlabel="stride of the tokens", yscale="log")
        ax.grid(alpha=0.3)
    lines = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    sheet.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    sheet.savefig(path, dpi=80)
    print(f"Drew {path}.")


if __name__ == "__main__":
    main()

"""How long a whole training step takes (forward, matching, losses, backward, clip, AdamW), and in PyTorch.

    python benchmarks/train_step.py --output=table.md        # on a GPU: all families, DETR first; 9 minutes at most
    python benchmarks/train_step.py --configs=configs/deperceiver.py:r50_8 --sizes=800x1066,1024x1024 --minutes=0
    python benchmarks/train_step.py --torch_python=/envs/torch/bin/python --config.matcher.backend=device

Every row is a process of its own on one device, with the same batches, which are on the device before the clock starts:
noise of one size, or the first batches of a planned epoch in their buckets (`bucketed`), with as many boxes as COCO's
images have. The PyTorch peers are Hugging Face's DETR and Deformable DETR. --config.a.b=value changes a field of ours
(and of the peers what they share with it). Without flags a CPU gets tiny images and the two families that have peers.

matching: what the step takes longer than with the assignment held fixed, as a share of it. MFU: the operations of the
matrix products and convolutions (preflight/arithmetic.py) on pixels that are image, over the time and the speed of
a large matrix product in that precision, measured first. memory: the most that the device's allocator held; on a CPU
the most that the whole process has had, libraries and compiling included.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.synthetic_batches import (  # noqa: E402
    CLASS_SLOTS,
    fixed_batches,
    planned_batches,
    write_batches,
)
from configs.base import resnet  # noqa: E402
from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402
from deperceiver_jax.program.huge_pages import use_huge_pages  # noqa: E402

WITH_PEERS = ["configs/detr.py:r50", "configs/deformable_detr.py:r50"]
OTHERS = ["deperceiver.py:r50_16", "deperceiver_plus.py:r50_multiscale", "smca.py:r50_multiscale"]
FAMILIES = [*WITH_PEERS, *(f"configs/{name}" for name in OTHERS)]
PRECISIONS = ["bfloat16", "float32"]
ACCELERATOR = dict(configs=FAMILIES, precisions=PRECISIONS, sizes=["800x1066", "bucketed"], batch=8, steps=20, rounds=3)
CPU = dict(configs=WITH_PEERS, precisions=["float32"], sizes=["128x160"], batch=1, steps=2, rounds=2)
MODES = ["eager", "channels_last", "compiled"]  # of train_step_torch.py
OURS = [sys.executable, str(ROOT / "benchmarks/train_step_jax.py")]
PLANNED = 16  # batches of a planned epoch that are gone through
SHORTEST = 15  # seconds; with less left no row is begun


def define_flags(values: flags.FlagValues) -> None:
    shared = dict(flag_values=values)
    flags.DEFINE_list("configs", None, "Config files with their variants, the most important first.", **shared)
    flags.DEFINE_list("precisions", None, "bfloat16, float32 or both.", **shared)
    flags.DEFINE_list("sizes", None, "HEIGHTxWIDTH of all images, or `bucketed`.", **shared)
    flags.DEFINE_integer("batch", None, "Images of a step.", **shared)
    flags.DEFINE_integer("steps", None, "Steps of a round.", **shared)
    flags.DEFINE_integer("rounds", None, "Rounds of a row.", **shared)
    flags.DEFINE_float("minutes", 9.0, "What is not done after so long is left out, and said; 0: no limit.", **shared)
    flags.DEFINE_string("torch_python", sys.executable, "A Python with torch and transformers.", **shared)
    flags.DEFINE_list("torch_modes", MODES, "Ways to run the peers; empty for none.", **shared)
    flags.DEFINE_string("output", "", "A file for the table, written anew after every row.", **shared)


def main(argv: list[str]) -> None:
    values, rest = parse_flags(argv, define_flags, __doc__)
    check("--precisions", values.precisions or [], PRECISIONS)
    check("--torch_modes", values.torch_modes, MODES)
    end = time.monotonic() + 60 * values.minutes if values.minutes else float("inf")
    theirs = [values.torch_python, str(ROOT / "benchmarks/train_step_torch.py")]
    machine = call([*OURS, "--machine"], end)
    if "failed" in machine:
        raise UserError(f"There is no device to measure on: {machine['failed']}.")
    peer = find_peer(theirs, machine["platform"], end) if values.torch_modes else {}
    for name, default in (CPU if machine["platform"] == "cpu" else ACCELERATOR).items():
        if getattr(values, name) is None:
            values[name].value = default
    configs = {name: parse_config([argv[0], f"--config={ROOT / name}", *rest[1:]]) for name in values.configs}
    makers = {size: batch_maker(size, values.batch) for size in values.sizes}

    rows, left_out = [], []
    for precision, size, (name, config) in itertools.product(values.precisions, values.sizes, configs.items()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "batches.npz"
            common = [f"--batches={path}", f"--steps={values.steps}", f"--rounds={values.rounds}"]
            fields = [f"--config={ROOT / name}", *rest[1:], f"--config.precision={precision}"]
            jobs = {"this package": [*OURS, *common, *fields, f"--matching={size != 'bucketed'}"]}
            if peer and (model := peer_model(config)):
                shared = [*theirs, *common, f"--model={json.dumps(model)}", f"--device={peer['platform']}"]
                jobs |= {m: [*shared, f"--precision={precision}", f"--mode={m}"] for m in values.torch_modes}
            for job, command in jobs.items():
                row = {"config": name, "size": size, "precision": precision, "job": job}
                if end - time.monotonic() < SHORTEST:
                    left_out.append(row)
                    continue
                if not path.exists():
                    write_batches(path, makers[size](config.data))
                rows.append(row | call(command, end))
                if job != "this package":
                    rows[-1] = comparable(rows[-1], rows)
                print(progress(rows[-1]), file=sys.stderr, flush=True)
                if values.output:
                    Path(values.output).write_text(table(rows, left_out, values.batch, machine, peer))
    report = table(rows, left_out, values.batch, machine, peer)
    if values.output:
        Path(values.output).write_text(report)
    print(report)


def check(flag: str, given: Sequence[str], valid: Sequence[str]) -> None:
    for value in given:
        if value not in valid:
            raise UserError(f"{flag} has {value!r}; it takes {', '.join(valid)}.")


def call(command: Sequence[str], end: float) -> dict:
    """The line of JSON that a program prints, or {"failed": why}."""
    limit = None if end == float("inf") else max(end - time.monotonic(), 1.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": "out of time"}
    except OSError as error:
        return {"failed": f"{command[0]}: {error.strerror}"}
    if done.returncode < 0:
        return {"failed": f"ended by signal {-done.returncode}"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1].removeprefix("error: ").rstrip(".")}
    return json.loads(done.stdout.strip().splitlines()[-1])


def comparable(peer: dict, rows: Sequence[dict]) -> dict:
    """The peer's row; that it failed, where it trains other parameters than ours of the same model."""
    alike = [row for row in rows if all(row[key] == peer[key] for key in ALIKE) and "failed" not in row]
    ours = next((row for row in alike if row["job"] == "this package"), None)
    if "failed" in peer or ours is None or peer["trained_parameters"] == ours["trained_parameters"]:
        return peer
    counts = f"{peer['trained_parameters']:,} parameters, this package {ours['trained_parameters']:,}"
    return {key: peer[key] for key in (*ALIKE, "job")} | {"failed": f"it trains {counts}"}


def find_peer(theirs: Sequence[str], platform: str, end: float) -> dict:
    """What the peers run on; {}, and one sentence, where they cannot be compared with."""
    peer = call([*theirs, "--machine"], end)
    if "failed" in peer:
        print(f"No PyTorch peer: {peer['failed']}.")
    elif platform == "cpu":
        return peer | {"platform": "cpu"}
    elif platform != "gpu" or peer["platform"] != "cuda":
        print(f"No PyTorch peer: it would run on {peer['platform']}, and this package runs on {platform}.")
    else:
        return peer
    return {}


def batch_maker(size: str, batch_size: int) -> Callable[[ConfigDict], list]:
    """config.data -> the batches of one size, or of the plan."""
    if size == "bucketed":
        return lambda config: planned_batches(config, batch_size, PLANNED)
    sides = size.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--sizes has {size!r}; it takes HEIGHTxWIDTH, as in 800x1066, and bucketed.")
    return lambda config: fixed_batches((int(sides[0]), int(sides[1])), batch_size, 2)


def peer_model(config: ConfigDict) -> dict | None:
    """The same detector for train_step_torch.py; None where transformers has none."""
    model = config.model
    plain = resnet()
    plain.update(depth=model.backbone.depth, weights=model.backbone.weights)
    if model.name not in ("detr", "deformable_detr") or model.backbone.to_dict() != plain.to_dict():
        return None
    fields = {
        "name": model.name,
        "depth": model.backbone.depth,
        "frozen_stages": model.backbone.frozen_stages,
        "classes": CLASS_SLOTS,
        "num_queries": model.num_queries,
        "d_model": model.embed_dim,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), model.dropout),
    }
    for part, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        fields |= {f"{part}_layers": layers.num_layers, f"{part}_attention_heads": layers.num_heads}
        fields |= {f"{part}_ffn_dim": layers.mlp_dim}
    if model.name == "detr":
        same = (tuple(model.strides), model.pre_norm, model.position.encoding) == ((32,), False, "sine")
        return fields if same else None
    if (tuple(model.strides), model.extra_levels) not in (((8, 16, 32), 1), ((32,), 0)):
        return None
    return fields | {
        "num_feature_levels": len(model.strides) + model.extra_levels,
        "encoder_n_points": model.encoder.num_points,
        "decoder_n_points": model.decoder.num_points,
        "with_box_refine": model.refine,
        "two_stage": model.two_stage,
        "two_stage_num_proposals": model.num_queries,
    }


def progress(row: dict) -> str:
    name = f"{row['config']} {row['size']} {row['precision']} {row['job']}"
    return f"{name}: {row['failed']}" if "failed" in row else f"{name}: {1e3 * row['seconds']:.1f} ms"


ALIKE = ("config", "size", "precision")  # of the rows that are compared
HEADER = (
    "| model | images | type | program | images/s | step ms (fastest round) | matching | memory GiB | MFU "
    "| compile s | times the best peer |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(rows: Sequence[dict], left_out: Sequence[dict], batch_size: int, machine: dict, peer: dict) -> str:
    """Markdown: a row for each program, and what machine and versions they ran on."""
    lines = [HEADER]
    for row in rows:
        alike = [other for other in rows if all(other[key] == row[key] for key in ALIKE)]
        lines.append(f"| {' | '.join(cells(row, alike, batch_size, machine['peak_flops'][row['precision']]))} |")
    peaks = ", ".join(f"{speed / 1e12:.3g} TFLOP/s in {name}" for name, speed in machine["peak_flops"].items())
    lines.append(f"\nBatches of {batch_size}. Large matrix products run at {peaks}.")
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['config']} {row['size']} {row['precision']} {row['job']}: {row['failed']}.")
        elif "xla_flops" in row:
            share, flops = row["useful_share"], row["model_flops"]
            lines.append(
                f"{row['config']} {row['size']} {row['precision']}: {share:.1%} of the pixels are image; "
                f"{flops / 1e9:.0f} GFLOP a step, of which XLA's own count sees {row['xla_flops'] / flops:.0%}."
            )
    if left_out:
        names = ", ".join(f"{row['config']} {row['size']} {row['precision']} {row['job']}" for row in left_out)
        lines.append(f"Not run for want of time (--minutes): {names}.")
    versions = ", ".join(filter(None, [machine["versions"], peer["versions"] if peer else "no PyTorch"]))
    lines.append(f"{date.today()}, {machine['device']}, {machine['cores']} cores of the host; {versions}.")
    return "\n".join(lines) + "\n"


def cells(row: dict, alike: Sequence[dict], batch_size: int, peak: float) -> list[str]:
    """One row of the table; `alike` are the rows of the same model, images and precision, itself included."""
    name = [row["config"].removeprefix("configs/"), row["size"], row["precision"]]
    if "failed" in row:
        return [*name, row["job"], "failed", *["-"] * 6]
    done = [other for other in alike if "failed" not in other]
    ours = next((other for other in done if "model_flops" in other), None)
    best_peer = min((other["seconds"] for other in done if other is not ours), default=None)
    matching = 1 - row["unmatched_seconds"] / row["seconds"] if "unmatched_seconds" in row else None
    return [
        *name,
        row["implementation"],
        f"{batch_size / row['seconds']:.2f}",
        f"{1e3 * row['seconds']:.1f} ({1e3 * row['fastest']:.1f})",
        "-" if matching is None else f"{matching:.1%}",
        f"{row['peak_bytes'] / 2**30:.2f}",
        f"{ours['useful_flops'] / row['seconds'] / peak:.1%}" if ours else "-",
        f"{row['compile_seconds']:.0f}",
        f"{best_peer / row['seconds']:.2f}" if row is ours and best_peer else "-",
    ]


if __name__ == "__main__":
    use_huge_pages()  # as train.py does; the peers get the same
    sys.exit(run(main))

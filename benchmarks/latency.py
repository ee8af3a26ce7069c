"""Milliseconds that a picture takes: by JAX, by the exported ONNX file, by Hugging Face's same detector, in one run.

    python benchmarks/latency.py --config=configs/detr.py:r50 [--torch_python=/envs/torch/bin/python] \\
        [--size=800x1066] [--batches=1,8] [--rounds=20] [--threads=1]

From pixels (uint8) to scored boxes, with random parameters. A round is one batch; rounds of JAX and ONNX alternate, and
Hugging Face's, eager, come from a process of their own before and after them. onnxruntime runs on the CPU, and besides
with CUDA's and TensorRT's providers where it has them. The processor's time, over all threads, is what to compare where
other programs run at the same time; with several threads it counts their waiting too.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import call, peer_model  # noqa: E402
from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap  # noqa: E402
from deperceiver_jax.errors import UserError  # noqa: E402
from deperceiver_jax.export.onnx_file import write_onnx  # noqa: E402
from deperceiver_jax.export.program import INPUTS, Sizes, file_program, reference_program  # noqa: E402
from deperceiver_jax.models import build_detector, field_needs  # noqa: E402
from deperceiver_jax.models.skeleton import take_apart  # noqa: E402
from deperceiver_jax.program.command_line import parse_config, parse_flags, run  # noqa: E402
from deperceiver_jax.runs.load_detector import LoadedDetector  # noqa: E402

OUTPUTS = ("boxes", "scores", "labels")
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider")
CLASSES = ClassMap.from_categories(COCO_CATEGORIES.items())
WARM_UP = 2  # rounds that do not count


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("size", "800x1066", "HEIGHTxWIDTH of the pictures, all of it real.", flag_values=values)
    flags.DEFINE_list("batches", ["1", "8"], "Pictures at one time.", flag_values=values)
    flags.DEFINE_integer("rounds", 20, "Batches that are timed.", flag_values=values, lower_bound=2)
    flags.DEFINE_integer("threads", 0, "Of onnxruntime and PyTorch; 0: their own choice.", flag_values=values)
    flags.DEFINE_string("torch_python", "", "A Python with torch and transformers; empty: none.", flag_values=values)


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    config = parse_config(config_arguments, needs=field_needs)
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", values.size)):
        raise UserError(f"--size is {values.size}; it is to be like 800x1066.")
    if not all(batch.isdecimal() and int(batch) for batch in values.batches):
        raise UserError(f"--batches is {','.join(values.batches)}; it takes numbers of pictures, as in 1,8.")
    frame = int(match[1]), int(match[2])
    loaded = random_detector(config)
    reference = reference_program(loaded)
    count = sum(array.size for array in loaded.arrays.values())
    print(
        f"{config.model.name}, {values.size} pixels, {count / 1e6:.1f} M parameters, {os.cpu_count()} CPUs", flush=True
    )
    if values.torch_python and peer_model(config) is None:
        print("No PyTorch peer: Hugging Face has no detector with these fields.", flush=True)
    print(
        "| program | batch | ms a picture, median | 99th percentile | processor's ms | MB |\n|---|---|---|---|---|---|"
    )
    ratios = []
    for batch in map(int, values.batches):
        images = np.random.default_rng(0).integers(0, 256, (batch, *frame, 3), np.uint8)
        size = np.tile(np.int32(frame), (batch, 1))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "detector.onnx")
            write_onnx(path, file_program(loaded, config.precision), Sizes(batch, frame, 1, 1), {})
            megabytes = path.stat().st_size / 1e6
            programs: dict[str, Callable] = {f"JAX, {jax.devices()[0].platform}": reference}
            programs |= {f"ONNX, {provider}": session for provider, session in sessions(path, values.threads)}
        before = peer_times(values, config, batch)
        times = measure(programs, (images, size, size), values.rounds)
        after = peer_times(values, config, batch)
        for name, seconds in times.items():
            print(row(name, batch, seconds, f"{megabytes:.0f}" if name.startswith("ONNX") else ""), flush=True)
        if "failed" in before | after:
            print(f"No PyTorch peer: {(before | after)['failed']}.")
        elif before:
            name = f"Hugging Face, {before['platform']}, {before['parameters'] / 1e6:.1f} M"
            theirs = before["seconds"] + after["seconds"]
            print(row(name, batch, theirs, f"{before['bytes'] / 1e6:.0f}"), flush=True)
            ratios.append(share(batch, times, theirs))
    print("\n".join(ratios))


def random_detector(config) -> LoadedDetector:
    config.model.num_classes = CLASSES.num_slots
    skeleton, params, others = take_apart(build_detector(config, rngs=nnx.Rngs(0)))
    arrays = {path: np.asarray(array) for path, array in {**params, **others}.items()}
    return LoadedDetector(skeleton, arrays, config, CLASSES)


def sessions(path: Path, threads: int):
    """(provider, program) of each way that onnxruntime has here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for provider in PROVIDERS:
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
            yield provider, lambda *x, s=session: s.run(OUTPUTS, dict(zip(INPUTS, x, strict=True)))


def measure(programs: dict[str, Callable], inputs, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, the processor's seconds) of each round of each program, round by round in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(rounds + WARM_UP):
        for name, program in programs.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*inputs))
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - start, time.process_time() - used))
    return times


def peer_times(values, config, batch: int) -> dict:
    """What latency_torch.py prints; {} without a peer."""
    model = peer_model(config)
    if not values.torch_python or model is None:
        return {}
    flags = [
        f"--size={values.size}",
        f"--batch={batch}",
        f"--rounds={-(-values.rounds // 2)}",
        f"--threads={values.threads}",
    ]
    command = [
        values.torch_python,
        str(ROOT / "benchmarks" / "latency_torch.py"),
        f"--model={json.dumps(model)}",
        *flags,
    ]
    return call(command, float("inf"))


def share(batch: int, times: dict[str, list[tuple[float, float]]], theirs: list[tuple[float, float]]) -> str:
    """How much of Hugging Face's time each way of ONNX takes, by the medians."""
    wall, used = np.median(theirs, axis=0)
    parts = []
    for name, seconds in times.items():
        if name.startswith("ONNX"):
            ours = np.median(seconds, axis=0)
            parts.append(f"{name} takes {ours[0] / wall:.2f} of Hugging Face's time, {ours[1] / used:.2f} by processor")
    return f"Batch {batch}: {'; '.join(parts)}."


def row(name: str, batch: int, seconds: list[tuple[float, float]], megabytes: str) -> str:
    wall, used = 1e3 * np.asarray(seconds).T / batch
    numbers = (np.median(wall), np.percentile(wall, 99), np.median(used))
    return f"| {name} | {batch} | {' | '.join(f'{number:.1f}' for number in numbers)} | {megabytes} |"


if __name__ == "__main__":
    sys.exit(run(main))

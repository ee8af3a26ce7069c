"""Time and memory of the inside of multi-scale deformable attention, forward and backward, beside plain PyTorch's.

    python benchmarks/deformable_attention.py --torch_python=/another/venv/bin/python
    python benchmarks/deformable_attention.py --ahead_of_time=v5e:2x2        # needs libtpu, and no TPU

An 800 x 1066 image: levels of strides 8 to 64, 8 heads of 32 channels, 4 points. `encoder` has a query for each of the
17,821 tokens, which looks at points around itself; `decoder` has 300 that look anywhere. PyTorch's side is one
grid_sample a level. Each side is a process of its own that computes when it is told to, the sides by turns; seconds
are the smallest of --rounds calls, on the clock and of all its threads together: where other work shares the cores,
only the latter say much. Memory is the highest resident size during the first call after compilation, above that before
it (Linux), or the device's peak where there is a GPU.

This file also runs under an interpreter without this package: hence argparse, and imports where they are used.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LEVEL_SIZES = ((100, 134), (50, 67), (25, 34), (13, 17))
HEADS, CHANNELS, POINTS = 8, 32, 4
NUM_TOKENS = sum(height * width for height, width in LEVEL_SIZES)
QUERIES = {"encoder": NUM_TOKENS, "decoder": 300}


def make_inputs(batch: int, which: str) -> list:
    """value, location, weight and the gradient of the output, NumPy float32, in sample_levels' order of axes."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (batch, QUERIES[which], HEADS, len(LEVEL_SIZES), POINTS)
    if which == "encoder":
        places = [
            np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), axis=-1).reshape(-1, 2)
            for h, w in LEVEL_SIZES
        ]
        cells = np.array([(w, h) for h, w in LEVEL_SIZES])[:, None]
        location = np.concatenate(places)[None, :, None, None, None] + rng.normal(0, 3, (*shape, 2)) / cells
    else:
        location = rng.uniform(0, 1, (*shape, 2))
    value = rng.standard_normal((batch, NUM_TOKENS, HEADS, CHANNELS))
    weight = rng.dirichlet(np.ones(shape[-1] * shape[-2]), shape[:-2]).reshape(shape)
    gradient = rng.standard_normal((batch, QUERIES[which], HEADS, CHANNELS))
    return [np.asarray(x, np.float32) for x in (value, location, weight, gradient)]


def torch_call(inputs):
    """A call that computes output and gradients, and one that reads the device's peak memory, or None."""
    import torch

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *inputs, gradient = (torch.from_numpy(x).to(device) for x in inputs)
    for array in inputs:
        array.requires_grad_()

    def sampled_sum(value, location, weight):
        batch, num_queries = location.shape[:2]
        total, start = 0, 0
        for level, (height, width) in enumerate(LEVEL_SIZES):
            cells = value[:, start : start + height * width].permute(0, 2, 3, 1)
            start += height * width
            grid = 2 * location[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            found = torch.nn.functional.grid_sample(
                cells.reshape(batch * HEADS, CHANNELS, height, width), grid, align_corners=False
            )
            share = weight[:, :, :, level].transpose(1, 2).flatten(0, 1)
            total = total + (found * share[:, None]).sum(dim=-1)
        return total.reshape(batch, HEADS, CHANNELS, num_queries).permute(0, 3, 1, 2)

    def call():
        output = sampled_sum(*inputs)
        gradients = torch.autograd.grad(output, inputs, gradient)
        if device == "cuda":
            torch.cuda.synchronize()
        return output.detach(), gradients

    return call, torch.cuda.max_memory_allocated if device == "cuda" else None


def jax_function(sampling: str):
    import jax

    from deperceiver_jax.models.layers.level_sampling import sample_levels

    def output_and_gradients(value, location, weight, gradient):
        def run(value, location, weight):
            return sample_levels(value, LEVEL_SIZES, location, weight, sampling=sampling)

        output, backward = jax.vjp(run, value, location, weight)
        return output, backward(gradient)

    return jax.jit(output_and_gradients)


def jax_call(sampling: str, inputs):
    import jax

    inputs = jax.device_put(inputs)
    compiled = jax_function(sampling).lower(*inputs).compile()
    device = jax.devices()[0]
    peak = None if device.platform == "cpu" else (lambda: device.memory_stats()["peak_bytes_in_use"])
    return (lambda: jax.block_until_ready(compiled(*inputs))), peak


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}.")


def work(side: str, batch: int, which: str) -> None:
    """The first call, memory and a checksum on one line; then, for each line read, a call and its two times."""
    inputs = make_inputs(batch, which)
    call, device_peak = torch_call(inputs) if side == "torch" else jax_call(side, inputs)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    output, gradients = call()
    peak = device_peak() if device_peak else resident("VmHWM") - before
    checksum = sum(float(abs(array).sum()) for array in (output, *gradients))
    del output, gradients
    print(peak, checksum, flush=True)
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        print(time.perf_counter() - start, time.process_time() - start_cpu, flush=True)


def compare(sides: dict[str, str], batch: int, which: str, rounds: int) -> None:
    """Prints one row a side. `sides` maps names to interpreters."""
    workers, first = {}, {}
    for side, interpreter in sides.items():
        command = [interpreter, __file__, f"--side={side}", f"--batch={batch}", f"--queries={which}"]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first[side] = [float(word) for word in workers[side].stdout.readline().split()]
        if not first[side]:
            sys.exit(f"{side} ended without an answer; see above.")
    times = {side: [] for side in sides}
    for _ in range(rounds):
        for side, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            times[side].append([float(word) for word in worker.stdout.readline().split()])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    reference = next(iter(sides))
    for side in sides:
        peak, checksum = first[side]
        clock, threads = (min(each) for each in zip(*times[side], strict=True))
        if abs(checksum / first[reference][1] - 1) > 1e-4:
            sys.exit(f"{side} and {reference} compute different numbers.")
        ratios = [clock / min(a for a, _ in times[reference]), threads / min(b for _, b in times[reference])]
        columns = [f"{clock:.3f}", f"{threads:.3f}", f"{peak / 2**20:.0f}"]
        columns += [f"{ratio:.2f}" for ratio in (*ratios, peak / first[reference][0])]
        print(f"| {which} | {batch} | {side} | {' | '.join(columns)} |", flush=True)


def compile_ahead(topology: str, samplings: list[str], batch: int) -> None:
    """What the compiler says of both ways on a TPU, in bfloat16 with encoder queries."""
    import jax
    import jax.numpy as jnp

    from deperceiver_jax.preflight.chips import open_topology

    sharding = jax.sharding.SingleDeviceSharding(open_topology(topology)[1][0])
    types = (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16)
    arguments = [
        jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)
        for array, dtype in zip(make_inputs(batch, "encoder"), types, strict=True)
    ]
    print("\n| ahead of time | batch | sampling | temporary MiB | seconds to compile |\n|---|---|---|---|---|")
    for sampling in samplings:
        start = time.perf_counter()
        memory = jax_function(sampling).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        seconds = time.perf_counter() - start
        print(f"| {topology} | {batch} | {sampling} | {memory / 2**20:.0f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--samplings", nargs="+", default=["gather"], help="ours to measure: gather, auto")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=["encoder", "decoder"], choices=list(QUERIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ahead_of_time", help="compile for this TPU topology instead of measuring")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--queries", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return work(args.side, args.batch, args.queries)
    if args.ahead_of_time:
        return compile_ahead(args.ahead_of_time, args.samplings, args.batches[0])
    sides = dict.fromkeys(args.samplings, sys.executable)
    if subprocess.run([args.torch_python, "-c", "import torch"], capture_output=True).returncode == 0:
        sides = {"torch": args.torch_python} | sides
    else:
        print(f"{args.torch_python} cannot import torch, so ours stands alone; --torch_python names one that can.")
    print("| queries | batch | side | seconds | of threads | peak MiB | ratio | of threads | of memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for which in args.cases:
        for batch in args.batches:
            compare(sides, batch, which, args.rounds)


if __name__ == "__main__":
    main()

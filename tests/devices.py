"""One training step of every family, spread over devices and processes, beside the same step on one device.

    python -m tests.devices [--only detr deperceiver] [--double]

prints the largest differences of every family with both matchers on 2, 4, 8 and 4 x 2 devices (the parameters split
over two of them) and on two processes with two devices each, always against one device and SciPy's matcher; about
ten minutes on two cores. training/test_devices.py asserts one row of each family.

Float32 sums in another order differ: losses by at most LOSS relatively, gradients and their norms by at most GRADIENT
of the largest number in the same gradient. That holds for parameters and images that put no ReLU's input at zero up to
rounding, where it may be on in one program and off in the other; --double compares in float64, where that is rarer.
"""

import argparse
import contextlib
import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.quick_compile import quick_flags

if __name__ == "__main__":  # before JAX starts; tests/conftest.py does the same and says why
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", quick_flags(8))
    os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
from jax.sharding import Mesh

from configs.demo import get_config
from deperceiver_jax.models import DETECTORS
from deperceiver_jax.sharding import make_mesh, shard_batch
from deperceiver_jax.structures import Batch
from deperceiver_jax.training.build import build_training
from tests.drawn_arrays import Patches, draw_arrays, new_detector
from tests.parity import double_precision
from tests.processes import Forked, free_address

LOSS, GRADIENT = 1e-5, 1e-3
LEAST = 1e-3  # of the largest number in all gradients counts as the largest in one: a key's bias has none but rounding
FAMILIES, BACKENDS = tuple(DETECTORS), ("scipy", "device")
MESHES = {"2": (2, 1), "4": (4, 1), "8": (8, 1), "4 x 2": (8, 2)}  # devices, of which along `model`
PAIR = "2 processes x 2"
BATCH, HEIGHT, WIDTH, SLOTS = 8, 64, 32, 3
SMALL = dict(num_heads=2, cross_heads=2, self_heads=2, num_layers=2, mlp_dim=64)
SMALL |= dict(num_latents=8, latent_dim=64, num_blocks=1, num_cross_attentions=1)


class Step(NamedTuple):
    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]  # by path
    held: float  # share of the whole state that one device has


class Difference(NamedTuple):
    """The largest between two steps, and where."""

    loss: float  # relative, of any metric but the norms
    loss_name: str
    gradient: float  # over the largest number in the same gradient
    gradient_name: str

    @property
    def passes(self) -> bool:
        return self.loss <= LOSS and self.gradient <= GRADIENT


def small_config(name: str, backend: str):
    """The family's demo, 64 wide."""
    config = get_config(name)
    model = config.model
    model.update(num_classes=4, num_queries=6, embed_dim=64)
    model.backbone.width = 8
    if name == "smca":
        model.update(strides=(16,), extra_levels=1)
        model.encoder.layout = ("multi",)
    for part in ("encoder", "decoder"):
        if part in model:
            model[part].update({field: value for field, value in SMALL.items() if field in model[part]})
    config.data.batch_size = BATCH
    config.matcher.backend = backend
    config.optimizer.clip_norm = 0.0
    config.optimizer.eps = 1.0  # of Adam, whose first step would else be the sign of every gradient, rounding included
    return config


def global_batch() -> Batch:
    """Images of two sizes in one frame, without any box, with some, and with as many as there is room for."""
    rng = np.random.default_rng(6)
    size = np.int32([[HEIGHT, WIDTH], [HEIGHT - 9, WIDTH - 14]])[np.arange(BATCH) % 2]
    return Batch(
        image=rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3), np.uint8),
        size=size,
        original_size=size,
        example=np.arange(BATCH, dtype=np.int32),
        boxes=rng.uniform(0.1, 0.5, (BATCH, SLOTS, 4)).astype(np.float32),
        labels=rng.integers(0, 4, (BATCH, SLOTS), np.int32),
        box_valid=np.arange(SLOTS)[None] < (np.arange(BATCH) % (SLOTS + 1))[:, None],
    )


def one_step(name: str, backend: str, mesh: Mesh) -> Step:
    """Every process of the mesh calls this and passes its part of the batch; each gets the whole answer.

    Only the first family has its backbone, which is the same in all of them.
    """
    config = small_config(name, backend)
    backbone = None if name == FAMILIES[0] else Patches
    plan, _, _, step = build_training(
        config, mesh, steps_per_epoch=10, num_steps=100, detector=lambda rngs: new_detector(config, backbone, rngs)
    )
    arrays = draw_arrays({**plan.abstract.params, **plan.abstract.frozen})

    def place(array, like):
        array = np.asarray(array, like.dtype)
        return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])

    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.abstract)
    start = start._replace(params={path: arrays[path] for path in plan.abstract.params})
    start = start._replace(frozen={path: arrays[path] for path in plan.abstract.frozen})
    start = jax.tree.map(place, start, plan.abstract)
    here = BATCH // jax.process_count()
    rows = slice(here * jax.process_index(), here * (jax.process_index() + 1))
    batch = shard_batch(jax.tree.map(lambda x: x[rows], global_batch()), mesh)

    state, metrics = step(start, batch)
    held, whole = (
        sum(size(x) for x in jax.tree.leaves(state))
        for size in (lambda x: x.addressable_shards[0].data.nbytes, lambda x: x.nbytes)
    )
    moments = jax.device_get(state.opt_state[1].mu)  # of Adam, whose first step makes them (1 - b1) * gradient
    gradients = {path: np.asarray(x) / (1 - config.optimizer.b1) for path, x in moments.items()}
    return Step({term: float(x) for term, x in jax.device_get(metrics).items()}, gradients, held / whole)


@functools.cache
def reference(name: str) -> Step:
    """On one device, matched by SciPy."""
    return one_step(name, "scipy", make_mesh(devices=jax.devices()[:1]))


def difference(name: str, step: Step) -> Difference:
    """Of a step of this family from `reference`."""
    expected = reference(name)
    assert step.metrics.keys() == expected.metrics.keys() and step.gradients.keys() == expected.gradients.keys()
    assert expected.metrics["grad_norm"] > 1.0 and expected.metrics["num_boxes"] == 12
    terms = {term: abs(step.metrics[term] - x) / max(abs(x), 1e-6) for term, x in expected.metrics.items()}
    gradients = {term: terms.pop(term) for term in ("grad_norm", "update_norm")}
    least = LEAST * max(np.abs(x).max() for x in expected.gradients.values())
    for path, x in expected.gradients.items():
        gradients[path] = float(np.abs(step.gradients[path] - x).max() / max(np.abs(x).max(), least))
    loss_name, gradient_name = max(terms, key=terms.get), max(gradients, key=gradients.get)
    return Difference(terms[loss_name], loss_name, gradients[gradient_name], gradient_name)


def steps_of_two_processes(cases: list[tuple[str, str]]) -> dict[tuple[str, str], Step]:
    """{(family, backend): the step} of two processes with two devices each."""
    address = free_address()
    with tempfile.TemporaryDirectory() as directory:
        pair = [Forked(_run_process, address, index, cases, Path(directory), devices=2) for index in range(2)]
        for status, _, errors in [process.end() for process in pair]:
            if status:
                raise RuntimeError(errors)
        return {case: _read(Path(directory) / f"{':'.join(case)}.npz") for case in cases}


def _run_process(address: str, index: int, cases: list[tuple[str, str]], directory: Path) -> int:
    """One of the two, which writes what both have found."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(address, 2, index)
    for case in cases:
        step = one_step(*case, make_mesh())
        if index == 0:
            arrays = {f"metrics:{term}": x for term, x in step.metrics.items()}
            arrays |= {f"gradients:{path}": x for path, x in step.gradients.items()}
            np.savez(directory / f"{':'.join(case)}.npz", held=step.held, **arrays)
    return 0


def _read(path: Path) -> Step:
    arrays = dict(np.load(path))
    held = float(arrays.pop("held"))
    parts = {"metrics": {}, "gradients": {}}
    for key, array in arrays.items():
        part, name = key.split(":", 1)
        parts[part][name] = array
    return Step({term: float(x) for term, x in parts["metrics"].items()}, parts["gradients"], held)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints how far devices and processes are from one device.")
    parser.add_argument("--only", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    parser.add_argument("--double", action="store_true", help="in float64; without the two processes")
    arguments = parser.parse_args()
    with double_precision() if arguments.double else contextlib.nullcontext():
        for name in arguments.only:
            for backend, (devices, (count, model)) in itertools.product(BACKENDS, MESHES.items()):
                mesh = make_mesh(model, devices=jax.devices()[:count])
                _print(name, backend, devices, one_step(name, backend, mesh))
            if not arguments.double:
                for (_, backend), step in steps_of_two_processes([(name, backend) for backend in BACKENDS]).items():
                    _print(name, backend, PAIR, step)


def _print(name: str, backend: str, devices: str, step: Step) -> None:
    found = difference(name, step)
    verdict = "" if found.passes else "  BEYOND"
    print(
        f"{name:18}{backend:8}{devices:17}losses {found.loss:.1e}  gradients {found.gradient:.1e} "
        f"({found.gradient_name}){verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()

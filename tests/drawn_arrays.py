"""Parameters for tests: drawn at random, and a detector's own without those of its backbone."""

import math

import jax
import numpy as np

from deperceiver_jax.training.train_state import take_apart


def draw_arrays(shapes):
    """{path: array} for {path: anything with a shape}, of such sizes that activations stay of the order of one.

    A detector's own initialisation takes longer to compile than these tests take.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for path, like in sorted(shapes.items()):
        values, kind = rng.standard_normal(like.shape, np.float32), path.split("/")[-1]
        if kind == "kernel":
            values *= (1.5 / math.prod(like.shape[-4:-1] if len(like.shape) > 3 else like.shape[-2:-1])) ** 0.5
        elif kind in ("scale", "var"):
            values = 1 + 0.1 * np.abs(values)
        elif kind in ("bias", "mean"):
            values *= 0.1
        arrays[path] = values
    return arrays


def start_beside_backbone(build):
    """{path: array} of what the detector trains, as it starts, without the backbone, which takes longest to compile."""

    def parameters():
        _, trained, _ = take_apart(build())
        return {path: x for path, x in trained.items() if not path.startswith("backbone/")}

    return jax.tree.map(np.asarray, jax.jit(parameters)())

"""Parameters drawn from their official names, so that two programs can hold the same weights without sharing a file.

Every array depends on (seed, name, shape) alone: a reference implementation and this one are filled with the same
numbers, whatever their layouts, and a golden file need hold only outputs. Nothing is zero or one by convention, for
such a part could be wrong unnoticed. NumPy only: the reference side imports this file too.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np


def seeded_state_dict(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """{name: float32 array} in the official layout, of such sizes that activations stay of the order of one."""
    return {name: seeded_array(name, shape, seed) for name, shape in shapes.items()}


def seeded_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The array of one official name: what kind of parameter it is shows in the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    values = rng.standard_normal(shape, dtype=np.float64)
    if name.endswith("running_var"):
        values = np.exp(0.2 * values)
    elif name.endswith(("running_mean", "bias", "in_proj_bias")):
        values = 0.1 * values
    elif name.endswith(("latents", "query_embed.weight")) or "embedding" in name:
        pass  # N(0, 1), as they start
    elif len(shape) == 1:  # the scale of a norm; a residual branch ends in a smaller one, or the sum grows and grows
        values = (0.3 if name.endswith("bn3.weight") else 1.0) * (1 + 0.2 * values)
    else:
        gain = 2.0 if len(shape) == 4 else 1.0  # convolutions are followed by ReLU
        values = values * math.sqrt(gain / math.prod(shape[1:]))
        # Larger queries and keys: attention that is nearly uniform hides what it attends to.
        if name.endswith((".q.weight", ".k.weight")):
            values = 2 * values
        elif name.endswith("in_proj_weight"):  # rows of queries, keys and values
            values[: 2 * len(values) // 3] *= 2
    return values.astype(np.float32)

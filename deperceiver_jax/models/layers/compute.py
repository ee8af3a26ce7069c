"""How a detector computes, as against what it is: the same parameters serve every choice."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Of layers that answer places, sizes or scores, in whatever a detector computes the rest: float32 alone would still
# multiply bfloat16 on TPUs, and TF32 on GPUs.
EXACT: dict[str, Any] = dict(dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Compute:
    """Handed to every part of a detector when it is made."""

    dtype: Any  # of activations and matrix products; parameters are float32
    attention: str  # one of models/attention/choice.py's IMPLEMENTATIONS
    rematerialize: bool  # layers compute their activations again in the backward pass: less memory, more work
    # For a file that another runtime reads: no switch between platforms, no kernel, layers one after the other instead
    # of in a loop, and no operation but those that every runtime has. Forward only.
    portable: bool = False

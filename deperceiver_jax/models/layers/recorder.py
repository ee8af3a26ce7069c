"""What the attentions of a detector do in one forward pass, kept for a person to look at.

    with record_attention(detector, "cross_attention") as records:
        predictions = detector(image, pixel_valid)

While nothing records, an attention only asks whether something does. While something does, stacks of layers are Python
loops, so every layer's arrays can be kept under the layer's own name. Records are pytrees: inside of a jitted function,
return them. A function that was compiled before records nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float

from deperceiver_jax.models.kernels.log_gaussian import Bias, bias_map
from deperceiver_jax.structures import Array


class DenseRecord(struct.PyTreeNode):
    """One dense attention as it was applied; its result is `probability` times the values."""

    name: str = struct.field(pytree_node=False)  # its place in the detector: decoder.layers.3.cross_attention
    segments: tuple[int, ...] = struct.field(
        pytree_node=False
    )  # lengths of the runs of keys with a softmax of their own
    probability: Float[Array, "B H Q K"]  # 0 on padding; a row sums to 1, or to the sum of its segments' weights
    bias: Float[Array, "B Hb Qb K"] | None  # what was added to the logits: in every detector here, a log-Gaussian
    segment_weight: Float[Array, "B Q S"]  # how much each segment counts; it is part of `probability` already


class PointRecord(struct.PyTreeNode):
    """One deformable attention. Places are (x, y) in [0, 1] of each level's padded map."""

    name: str = struct.field(pytree_node=False)
    location: Float[Array, "B Q H L K 2"]
    weight: Float[Array, "B Q H L K"]  # sums to 1 over levels and points
    reference: Float[Array, "B Q L 2"]


class _Recorder:
    def __init__(self, detector: nnx.Module, wanted: str):
        self.records: list[DenseRecord | PointRecord] = []
        self.wanted = wanted
        self._modules: dict[int, tuple[str, nnx.Module]] = {}  # holding a module keeps its id from being given away
        self.name_parts("", detector)

    def name_parts(self, prefix: str, module: nnx.Module) -> None:
        for path, part in nnx.iter_graph(module):
            if isinstance(part, nnx.Module):
                name = ".".join(str(step) for step in (prefix, *path) if step != "")
                self._modules[id(part)] = (name, part)

    def name(self, module: nnx.Module) -> str:
        return self._modules[id(module)][0]


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def record_attention(detector: nnx.Module, wanted: str = "") -> Iterator[list[DenseRecord | PointRecord]]:
    """Keeps what the attentions of `detector` whose names contain `wanted` do inside this context, in order of time.

    In this thread alone, and as without dropout.
    """
    recorder = _Recorder(detector, wanted)
    token = _recorder.set(recorder)
    try:
        yield recorder.records
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    return _recorder.get() is not None


def name_layer(stack: nnx.Module, index: int, layer: nnx.Module) -> None:
    """Layers of a stack are made when they are called; this one is the stack's layer `index`."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.name_parts(f"{recorder.name(stack)}.{index}", layer)


def record_dense(
    attention: nnx.Module,
    query: Float[Array, "B H Q D"],
    key: Float[Array, "B H K D"],
    key_valid: Bool[Array, "B K"] | None,
    bias: Bias | list[Bias] | None,
    segments: Sequence[int] | None,
    segment_weight: Float[Array, "B Q S"] | None,
) -> None:
    """Called by MultiHeadAttention with what it is about to apply."""
    recorder = _recorder.get()
    if recorder is None or recorder.wanted not in recorder.name(attention):
        return
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
    if bias is not None:
        bias = bias_map(bias)
        logits = logits + bias
    segments = (key.shape[2],) if segments is None else tuple(segments)
    if segment_weight is None:
        segment_weight = jnp.ones((query.shape[0], query.shape[2], len(segments)), jnp.float32)
    valid = jnp.ones((len(key), key.shape[2]), bool) if key_valid is None else key_valid
    valid, parts, start = valid[:, None, None, :], [], 0
    for i, length in enumerate(segments):
        run = slice(start, start + length)
        probability = jax.nn.softmax(jnp.where(valid[..., run], logits[..., run], -1e30), axis=-1)
        parts.append(jnp.where(valid[..., run], probability, 0.0) * segment_weight[:, None, :, i, None])
        start += length
    probability = jnp.concatenate(parts, axis=-1)
    recorder.records.append(DenseRecord(recorder.name(attention), segments, probability, bias, segment_weight))


def record_points(
    attention: nnx.Module,
    location: Float[Array, "B Q H L K 2"],
    weight: Float[Array, "B Q H L K"],
    reference: Float[Array, "B Q L 2"],
) -> None:
    """Called by MultiScaleDeformableAttention with where it is about to look."""
    recorder = _recorder.get()
    if recorder is not None and recorder.wanted in recorder.name(attention):
        recorder.records.append(PointRecord(recorder.name(attention), location, weight, reference))

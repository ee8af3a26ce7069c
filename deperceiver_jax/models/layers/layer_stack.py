"""A row of identical layers whose parameters share arrays with a leading layer axis, so that XLA compiles one body."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deperceiver_jax.models.layers.arrays import over_arrays
from deperceiver_jax.models.layers.by_platform import by_platform
from deperceiver_jax.models.layers.compute import Compute
from deperceiver_jax.models.layers.initializers import Undrawn
from deperceiver_jax.models.layers.recorder import is_recording, name_layer


class LayerStack(nnx.Module):
    """`num_layers` layers of one kind; every parameter has a leading axis [num_layers].

    Each layer is made as `make_layer(*arguments, compute=compute, rngs=rngs, **options)`, called as `layer(x, *args,
    dropout_key=key)`, and must return the next x, of the same shape.

    `unroll_on_cpu` is for convolutions: XLA's CPU backend runs their gradients inside a loop on its slowest path
    (ResNet-50, forward and backward, 256 x 256 x 2 on two cores: 11 s in a loop, 0.4 s unrolled), while on a TPU the
    loop compiles in half the time (v5e, 800 x 1088 x 8: 78 s against 161 s). The target platform decides.
    The backward pass keeps each layer's input alone and computes the rest again with `compute.rematerialize`, and in
    any case with `keep_inputs`.
    """

    def __init__(
        self,
        make_layer: Callable[..., nnx.Module],
        num_layers: int,
        *arguments,
        unroll_on_cpu: bool = False,
        keep_inputs: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
        **options,
    ):
        self.num_layers = num_layers
        self.unroll_on_cpu = unroll_on_cpu
        self.portable = compute.portable
        self.rematerialize = compute.rematerialize or (keep_inputs and not compute.portable)

        def make(rngs):
            return make_layer(*arguments, compute=compute, rngs=rngs, **options)

        if isinstance(rngs, Undrawn):
            self.layers = over_arrays(lambda x: np.zeros((num_layers, *x.shape), x.dtype), make(rngs))
            return
        keys = jax.random.split(rngs.params(), num_layers)
        if isinstance(keys, jax.core.Tracer):
            self.layers = nnx.vmap(lambda key: make(type(rngs)(key)))(keys)
        else:
            impl = jax.random.key_impl(keys)
            each = [jax.random.wrap_key_data(x, impl=impl) for x in np.asarray(jax.random.key_data(keys))]
            self.layers = over_arrays(lambda *layers: np.stack(layers), *(make(type(rngs)(key)) for key in each))

    def layer(self, index: int) -> Any:
        """One layer alone, with its own arrays."""
        graphdef, stacked = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(operator.itemgetter(index), stacked))

    def __call__(
        self,
        x: Any,
        *args,
        start: int = 0,
        stop: int | None = None,
        dropout_key: jax.Array | None = None,
        collect: bool = False,
    ) -> Any:
        """Applies layers start..stop-1 in order; `collect` returns every layer's output, stacked on a leading axis."""
        graphdef, stacked = nnx.split(self.layers)
        stop = self.num_layers if stop is None else stop
        if (start, stop) != (0, self.num_layers):
            stacked = jax.tree.map(lambda leaf: leaf[start:stop], stacked)
        keys = None if dropout_key is None else jax.random.split(dropout_key, stop - start)

        def apply_layer(x, state_and_key, index=None):
            state, key = state_and_key
            layer = nnx.merge(graphdef, state)
            if index is not None:
                name_layer(self, index, layer)
            y = layer(x, *args, dropout_key=key)
            return y, (y if collect else None)

        if self.rematerialize and not is_recording():  # what is recorded must not be made inside a checkpoint
            apply_layer = jax.checkpoint(apply_layer)

        def scan_layers(x, stacked, keys):
            return jax.lax.scan(apply_layer, x, (stacked, keys))

        def loop_layers(x, stacked, keys):
            outputs = []
            for i in range(stop - start):
                x, output = apply_layer(x, jax.tree.map(operator.itemgetter(i), (stacked, keys)), start + i)
                outputs.append(output)
            return x, (jax.tree.map(lambda *layers: jnp.stack(layers), *outputs) if collect else None)

        if is_recording() or self.portable:
            last, outputs = loop_layers(x, stacked, keys)
        elif self.unroll_on_cpu:
            last, outputs = by_platform(x, stacked, keys, cpu=loop_layers, default=scan_layers)
        else:
            last, outputs = scan_layers(x, stacked, keys)
        return outputs if collect else last


def apply_rematerialized(layer: nnx.Module, *args, **kwargs):
    """layer(*args, **kwargs), of which the backward pass keeps the arguments and computes the rest again."""
    graphdef, arrays = nnx.split(layer)

    @jax.checkpoint
    def apply(arrays, args, kwargs):
        return nnx.merge(graphdef, arrays)(*args, **kwargs)

    return apply(arrays, args, kwargs)


def start_alike(part: nnx.Module, *, kernels: bool) -> None:
    """Gives stacked layers the first one's biases and norms, or all its parameters: published layers start as copies,
    of which only the transformer's matrices are drawn anew."""
    for path, variable in nnx.iter_graph(part):
        if isinstance(variable, nnx.Variable) and (kernels or path[-1] != "kernel"):
            variable[...] = variable[...][:1]

"""StableHLO files: a program as jax.export serialises it, and metadata.json, in one uncompressed zip."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from deperceiver_jax.export.program import Answers, Sizes

PLATFORMS = ("cpu", "cuda", "tpu")  # of which one file serves each
PROGRAM, METADATA = "program.jax_export", "metadata.json"


def write_stablehlo(path: Path, program: Callable[..., Answers], sizes: Sizes, metadata: Mapping[str, str]) -> None:
    """Writes `program`, parameters inside."""

    def results(image, size, original_size):
        return program(image, size, original_size)._asdict()

    exported = jax.export.export(jax.jit(results), platforms=PLATFORMS)(*sizes.shapes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PROGRAM, bytes(exported.serialize()))
        archive.writestr(METADATA, json.dumps(dict(metadata), indent=1) + "\n")


def open_stablehlo(path: Path) -> Callable[..., Answers]:
    """run(image, size, original_size), by JAX."""
    with zipfile.ZipFile(path) as archive:
        exported = jax.export.deserialize(bytearray(archive.read(PROGRAM)))
    call = jax.jit(exported.call)
    return lambda *inputs: Answers(**jax.device_get(call(*inputs)))

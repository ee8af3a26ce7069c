"""Writes the .pth and .safetensors files that PyTorch programs read, without PyTorch.

A .pth is a zip archive: data.pkl builds a dict of tensors, whose numbers are in data/0, data/1, ... The pickle is
written opcode by opcode, for Python's own pickler wants to import what a file names. Its calls are the three that
`torch.load(weights_only=True)` allows to everyone.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import make_folder, reason, written_whole
from deperceiver_jax.weights.safe_unpickler import STORAGE_TYPES

ENDINGS = (".pth", ".safetensors")


def write_state_dict(path: Path, state: Mapping[str, np.ndarray], *, wrapper: str) -> None:
    """Writes {name: array} to `path`, whole or not at all, in the format of its ending.

    wrapper: the key under which a .pth holds the state dict, as in {"model": ...}; a .safetensors has no such thing.
    Raises UserError for another ending, and for a place that cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{path} is to end in {' or '.join(ENDINGS)}.")
    state = {name: np.asarray(array, order="C") for name, array in state.items()}
    try:
        make_folder(path.parent)
        with written_whole(path) as partial:
            if path.suffix == ".pth":
                _write_archive(partial, state, wrapper)
            else:
                save_file(state, partial, metadata={"format": "pt"})  # transformers asks for the metadata
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from None


def _write_archive(path: Path, state: Mapping[str, np.ndarray], wrapper: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # ZipInfo's date is always the same

        add("data.pkl", _pickled(state, wrapper))
        add("byteorder", b"little")
        for number, array in enumerate(state.values()):
            add(f"data/{number}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        add("version", b"3\n")


def _pickled(state: Mapping[str, np.ndarray], wrapper: str) -> bytes:
    """The pickle of {wrapper: {name: tensor}}, in which tensor i is the whole of storage i."""
    entries = [_text(name) + _tensor(str(i), array) for i, (name, array) in enumerate(state.items())]
    inner = pickle.EMPTY_DICT + pickle.MARK + b"".join(entries) + pickle.SETITEMS
    outer = pickle.EMPTY_DICT + pickle.MARK + _text(wrapper) + inner + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + outer + pickle.STOP


def _tensor(key: str, array: np.ndarray) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    kinds = {dtype: kind for kind, dtype in STORAGE_TYPES.items()}
    if array.dtype not in kinds:
        raise TypeError(f"PyTorch's files have no numbers of the type {array.dtype}.")
    storage = _tuple(
        _text("storage"), _global("torch", kinds[array.dtype]), _text(key), _text("cpu"), _integer(array.size)
    )
    strides = [stride // array.itemsize for stride in array.strides]
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()

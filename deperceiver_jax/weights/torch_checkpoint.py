"""Reads .safetensors files and PyTorch's .pth, .pt, .bin and .ckpt files into NumPy, without PyTorch.

PyTorch's files are pickles, which are programs; safe_unpickler.py reads them without running anything.
"""

import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives safetensors its bfloat16
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, load_file

from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, is_bucket, is_folder, reason, require_readable
from deperceiver_jax.weights.safe_unpickler import CheckpointUnpickler, Refused, Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("model", "state_dict", "model_state_dict")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a checkpoint, out of its {'model': ...} or {'state_dict': ...} if it has one.

    Arrays keep the file's type (bfloat16 as ml_dtypes has it) and only those of the state dict are read. Raises
    UserError for a file that is missing, truncated, not a checkpoint, or a program.
    """
    path = as_path(path)
    require_readable("The weights", path)
    if is_folder(path):
        raise UserError(f"{path} is a folder without model.safetensors; name a file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes()) if is_bucket(path) else load_file(path)
        with path.open("rb") as file:
            return _read_torch(file)
    except OSError as error:
        raise UserError(f"Cannot read the weights {path}: {reason(error)}.") from error
    except Refused as error:
        raise UserError(f"{path} is not loaded: {error}.") from error
    except _DAMAGE as error:
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {str(error) or type(error).__name__}"
        raise UserError(f"{path} is damaged, cut short or not a checkpoint{why}.") from error


# What Python's unpickler, zipfile, safetensors and NumPy raise on bytes that are not what they should be.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def _read_torch(file) -> dict[str, np.ndarray]:
    """The zip archives of PyTorch 1.6 and later, or the stream of pickles of earlier ones."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not is_zip:
        return _read_stream(file)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            raise ValueError("the archive holds no data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("it was written on a big-endian machine, which is not supported")
        tensors = _state_dict_of(CheckpointUnpickler(io.BytesIO(archive.read(names[0]))).load())
        storages = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            storages[storage.key] = np.frombuffer(archive.read(f"{folder}data/{storage.key}"), storage.dtype)
    return {name: tensor.array(storages) for name, tensor in tensors.items()}


def _read_stream(file) -> dict[str, np.ndarray]:
    """Magic number, protocol, system, object, storage keys (five pickles), then length and bytes of each storage."""
    if CheckpointUnpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("it is neither a zip archive nor a PyTorch stream")
    protocol, system = CheckpointUnpickler(file).load(), CheckpointUnpickler(file).load()
    if protocol != 1001:
        raise ValueError(f"its protocol is {protocol!r}, not 1001")
    if not system.get("little_endian", True):
        raise Refused("it was written on a big-endian machine, which is not supported")
    unpickler = CheckpointUnpickler(file)
    tensors = _state_dict_of(unpickler.load())
    wanted = {tensor.storage.key for tensor in tensors.values()}
    storages = {}
    for key in CheckpointUnpickler(file).load():
        storage = unpickler.storages[key]
        length = int.from_bytes(_exactly(file, 8), "little")
        if length != storage.length:
            raise ValueError(f"storage {key} has {length} elements instead of {storage.length}")
        data = _exactly(file, length * storage.dtype.itemsize)
        if key in wanted:
            storages[key] = np.frombuffer(data, storage.dtype)
    return {name: tensor.array(storages) for name, tensor in tensors.items()}


def _exactly(file, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError(f"{size - len(data)} bytes are missing at its end")
    return data


def _state_dict_of(loaded) -> dict[str, "Tensor"]:
    """The tensors of a state dict, wherever official checkpoints keep it; numbers beside them are left out."""
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {}
    if isinstance(loaded, dict):
        tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise Refused("it holds no state dict (a dict of named tensors)")
    return tensors

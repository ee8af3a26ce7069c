"""The safe machine that reads the pickles inside PyTorch's files.

A pickle is a program. The machine here knows how to build containers and tensors and nothing else: every other name
in it becomes an inert stand-in, nothing is ever imported, and a file that calls something weights have no business
with is refused by name.
"""

import math
import pickle
from collections import OrderedDict
from typing import NamedTuple

import ml_dtypes
import numpy as np

STORAGE_TYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Functions that ordinary checkpoints call to rebuild settings, counters and NumPy numbers. They are not run either.
_HARMLESS_FUNCTIONS = frozenset(
    "_codecs.encode builtins.bool builtins.bytes builtins.complex builtins.dict builtins.float builtins.int "
    "builtins.list builtins.object builtins.range builtins.slice builtins.str builtins.tuple "
    "collections.defaultdict collections.deque copyreg._reconstructor datetime.date datetime.datetime "
    "datetime.timedelta functools.partial numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar "
    "numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar numpy.dtype numpy.ndarray "
    "torch._utils._rebuild_device_tensor_from_numpy torch.device".split()
)
# Modules that no checkpoint has a reason to name at all.
_HOSTILE_MODULES = frozenset(
    "asyncio bdb code codeop commands ctypes distutils importlib marshal multiprocessing nt os pdb pickle pip pkgutil "
    "platform popen2 posix pty pydoc runpy setuptools shutil signal site socket subprocess sys threading timeit "
    "urllib webbrowser".split()
)


class Refused(Exception):
    """A file that is whole but asks for something this reader will not or cannot do."""


class Storage(NamedTuple):
    """A run of numbers that is in the file, by its key there."""

    key: str
    dtype: np.dtype
    length: int  # elements


class Tensor(NamedTuple):
    """A tensor that has not been read yet: which elements of which storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def array(self, storages: dict[str, np.ndarray]) -> np.ndarray:
        data = storages[self.storage.key]
        whole = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in whole):
            raise ValueError("a tensor has an impossible shape")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) and last >= data.size:
            raise ValueError(f"storage {self.storage.key} ends before its tensor does")
        strides = [stride * data.itemsize for stride in self.strides]
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, data.dtype)
        return np.array(np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, strides))


class _StandInType(type):
    """Metaclass of stand-ins: calling one, which is what a pickle's REDUCE does, makes an empty object or is refused.

    A class may be called, for its object stays a stand-in. A function may be called only if it is known to be
    harmless. Either way the real thing is not there: this decides which files are reported, not what they can do.
    """

    def __call__(cls, *args, **kwargs):
        name = cls.__name__
        last = name.rsplit(".", 1)[-1].lstrip("_")
        if not last[:1].isupper() and name not in _HARMLESS_FUNCTIONS:
            raise Refused(f"it wants to call {name}, which no weights need")
        return object.__new__(cls)


class _StandIn(metaclass=_StandInType):
    """Takes the place of any object this reader does not know; keeps nothing and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def _nothing(self, *_ignored):
        pass

    __setstate__ = __setitem__ = append = extend = add = _nothing


def _rebuild_tensor(storage, offset, shape, strides, *_ignored):
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_ignored):
    return data


_CONTAINERS = {"collections.OrderedDict": OrderedDict, "builtins.set": set, "builtins.frozenset": frozenset}
_REBUILDERS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


class CheckpointUnpickler(pickle.Unpickler):
    """Python's unpickler with its only two doors to the outside, names and persistent ids, led to the above."""

    def __init__(self, file) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full_name = f"{module}.{name}"
        if full_name in _CONTAINERS:
            return _CONTAINERS[full_name]
        if full_name in _REBUILDERS:
            rebuild = _REBUILDERS[full_name]
            return lambda *args: rebuild(*args)  # a fresh function: a pickle can set attributes of what it is given
        if module.split(".")[0] in _HOSTILE_MODULES:
            raise Refused(f"it wants {full_name}, which no weights need")
        if module == "builtins" and full_name not in _HARMLESS_FUNCTIONS and not name[:1].isupper():
            raise Refused(f"it wants {full_name}, which no weights need")
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGE_TYPES:
            return name
        return _StandInType(full_name, (_StandIn,), {})

    def persistent_load(self, persistent_id):
        kind, storage_type, key, _device, length, *view = persistent_id
        if kind != "storage" or storage_type not in STORAGE_TYPES:
            raise Refused(f"a tensor is of {getattr(storage_type, '__name__', storage_type)}, which is not supported")
        if view and view[0] is not None:
            raise Refused("it has views of storages, which PyTorch stopped writing in 2017")
        storage = Storage(str(key), STORAGE_TYPES[storage_type], length)
        return self.storages.setdefault(storage.key, storage)

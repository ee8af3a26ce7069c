"""Checkpoints are read as PyTorch reads them, from files made here byte by byte, and nothing in them runs."""

import argparse
import functools
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from deperceiver_jax.errors import UserError
from deperceiver_jax.weights.safe_unpickler import CheckpointUnpickler, Refused
from deperceiver_jax.weights.torch_checkpoint import read_state_dict


class Global:
    """Pickles as the global `module.name`, which need not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of `function` with `args`, then `state` is set on the result."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class New(Call):
    """Pickles as `function.__new__(function, *args)`, the way of ordinary objects."""


class Storage:
    def __init__(self, kind, key, values):
        self.kind, self.key, self.values = kind, key, values


class Pickler(pickle._Pickler):  # the one in Python, whose opcodes can be written by hand
    def __init__(self, file):
        super().__init__(file, protocol=2)

    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = Global("torch", value.kind)
            legacy = (None,) if getattr(self, "legacy", False) else ()
            return ("storage", kind, value.key, "cpu", value.values.size, *legacy)
        return None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(tuple(value.args))
            self.write(pickle.NEWOBJ if isinstance(value, New) else pickle.REDUCE)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, save_persistent_id)


def pickled(value, legacy=False):
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.legacy = legacy
    pickler.dump(value)
    return file.getvalue()


def tensor(storage, offset, shape, strides):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, OrderedDict())


def write_zip(path, value, storages, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", byteorder)
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())
    return path


def write_stream(path, value, storages):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            file.write(pickle.dumps(part, protocol=2))
        file.write(pickled(value, legacy=True))
        file.write(pickle.dumps([storage.key for storage in storages], protocol=2))
        for storage in storages:
            file.write(struct.pack("<q", storage.values.size) + storage.values.tobytes())
    return path


@pytest.fixture
def example():
    """(a state dict to be pickled, its storages, the arrays it means)."""
    base = np.arange(24, dtype=np.float32) / 7
    storages = {
        "0": Storage("FloatStorage", "0", base),
        "1": Storage("HalfStorage", "1", base[:5].astype(np.float16)),
        "2": Storage("BFloat16Storage", "2", base[:5].astype(ml_dtypes.bfloat16)),
        "3": Storage("LongStorage", "3", np.array([-1, 2**40], np.int64)),
    }
    matrix = base.reshape(4, 6)
    state = OrderedDict(
        whole=tensor(storages["0"], 0, (4, 6), (6, 1)),
        transposed=tensor(storages["0"], 0, (6, 4), (1, 6)),
        slice=tensor(storages["0"], 7, (2, 3), (6, 2)),
        expanded=tensor(storages["0"], 5, (2, 3), (0, 0)),
        scalar=tensor(storages["3"], 1, (), ()),
        empty=tensor(storages["0"], 24, (0, 3), (3, 1)),
        half=tensor(storages["1"], 0, (5,), (1,)),
        bfloat=tensor(storages["2"], 0, (5,), (1,)),
    )
    state["parameter"] = Call(Global("torch._utils", "_rebuild_parameter"), state["slice"], True, OrderedDict())
    values = dict(
        whole=matrix,
        transposed=matrix.T,
        slice=matrix[1:3, 1::2],
        expanded=np.full((2, 3), base[5]),
        scalar=np.array(2**40),
        empty=np.zeros((0, 3), np.float32),
        half=storages["1"].values,
        bfloat=storages["2"].values,
        parameter=matrix[1:3, 1::2],
    )
    return state, list(storages.values()), values


def check(state, values):
    assert set(state) == set(values)
    for name, value in values.items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape, name
        np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.parametrize("write", [write_zip, write_stream])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_both_torch_formats(tmp_path, example, write, key):
    state, storages, values = example
    check(read_state_dict(write(tmp_path / "x.pth", state if key is None else {key: state}, storages)), values)


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_what_training_checkpoints_hold_beside_the_weights(tmp_path, example, write):
    """Settings, callbacks, NumPy numbers and optimiser state, of classes that are not installed."""
    state, storages, values = example
    moment = Storage("FloatStorage", "4", np.ones(3, np.float32))
    dtype = Call(Global("numpy", "dtype"), "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    extra = {
        "epoch": 49,
        "args": New(
            Global("argparse", "Namespace"), state={"lr": 1e-4, "device": Call(Global("torch", "device"), "cuda")}
        ),
        "optimizer": {
            "state": {0: {"exp_avg": tensor(moment, 0, (3,), (1,))}},
            "param_groups": [{"betas": (0.9, 0.99)}],
        },
        "callbacks": {Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": None}},
        "ap": Call(
            Global("numpy.core.multiarray", "scalar"), dtype, Call(Global("_codecs", "encode"), "abc", "latin1")
        ),
        "stage": Call(Global("pytorch_lightning.trainer.states", "TrainerFn"), "fit"),
        "counts": Call(Global("collections", "defaultdict"), Global("__builtin__", "list")),
        "names": Call(Global("__builtin__", "set"), ["a", "b"]),
    }
    check(read_state_dict(write(tmp_path / "x.ckpt", {**extra, "model": state}, [*storages, moment])), values)


def test_a_real_argparse_namespace(tmp_path, example):
    state, storages, values = example
    namespace = argparse.Namespace(lr=1e-4)
    check(read_state_dict(write_zip(tmp_path / "x.pth", {"model": state, "args": namespace}, storages)), values)


def test_safetensors(tmp_path, example):
    *_, values = example
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({name: np.array(value, order="C") for name, value in values.items()}, path)
    check(read_state_dict(path), values)


HOSTILE = {
    "posix.system": Call(Global("posix", "system"), "touch pwned"),
    "os.system": Call(Global("os", "system"), "touch pwned"),
    "subprocess.Popen": Call(Global("subprocess", "Popen"), ["touch", "pwned"]),
    "builtins.eval": Call(Global("__builtin__", "eval"), "open('pwned', 'w')"),
    "builtins.exec": Call(Global("builtins", "exec"), "open('pwned', 'w')"),
    "builtins.getattr": Call(Global("builtins", "getattr"), 1, "real"),
    "importlib.import_module": Call(Global("importlib", "import_module"), "os"),
    "pickle.loads": Call(Global("pickle", "loads"), "x"),
    "torch.load": Call(Global("torch", "load"), "x"),
    "torch.hub.load_state_dict_from_url": Call(Global("torch.hub", "load_state_dict_from_url"), "x"),
    "numpy.load": Call(Global("numpy", "load"), "x"),
    "ctypes.CDLL": New(Global("ctypes", "CDLL"), "x"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_a_program_is_refused_by_name(tmp_path, monkeypatch, example, write, name):
    monkeypatch.chdir(tmp_path)
    state, storages, _ = example
    path = write(tmp_path / "x.pth", {"model": state, "extra": HOSTILE[name]}, storages)
    with pytest.raises(UserError, match=rf"x\.pth is not loaded: it wants (to call )?{name}, which no weights need"):
        read_state_dict(path)
    assert not (tmp_path / "pwned").exists()


def test_nothing_is_ever_run(tmp_path, monkeypatch):
    """Every way a pickle has to reach outside ends in stand-ins, even for names that are not refused."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the file was run")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    for outside in (Global("argparse", "Namespace"), Global("functools", "partial"), Global("enum", "Enum")):
        loaded = CheckpointUnpickler(
            io.BytesIO(pickled([outside, Call(outside, 1), New(outside, 1, state={"a": 1})]))
        ).load()
        for stand_in in loaded:
            assert not isinstance(stand_in, argparse.Namespace | functools.partial)
            assert not hasattr(stand_in, "a")
    # EXT opcodes look up copyreg's table, and a class may not be smuggled in as a tensor's storage.
    with pytest.raises((ValueError, Refused)):
        CheckpointUnpickler(io.BytesIO(b"\x80\x02\x82\x01.")).load()
    with pytest.raises((ValueError, TypeError)):
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        CheckpointUnpickler(io.BytesIO(pickled(Call(rebuild, Global("a", "B"), 0, (1,), (1,))))).load()
    # Attributes that a pickle sets on a rebuilding function stay with the copy it was given.
    rebuild = pickled(Global("torch._utils", "_rebuild_tensor_v2"))
    first, second = (CheckpointUnpickler(io.BytesIO(rebuild)).load() for _ in range(2))
    assert first is not second


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_cut_short(tmp_path, example, write):
    state, storages, _ = example
    whole = write(tmp_path / "whole.pth", state, storages).read_bytes()
    path = tmp_path / "x.pth"
    for size in [0, 3, *range(10, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.pth is damaged, cut short or not a checkpoint"):
            read_state_dict(path)


def test_cut_short_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones(9)}, path)
    whole = path.read_bytes()
    for size in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.safetensors is damaged, cut short"):
            read_state_dict(path)


def test_sentences(tmp_path, example):
    state, storages, _ = example
    with pytest.raises(UserError, match=r"Cannot read the weights .*none\.pth: No such file"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r" is a folder without model\.safetensors; name a file of weights\."):
        read_state_dict(tmp_path)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth is damaged, cut short or not a checkpoint"):
        read_state_dict(tmp_path / "text.pth")
    with pytest.raises(UserError, match="it holds no state dict"):
        read_state_dict(write_zip(tmp_path / "x.pth", {"epoch": 3}, []))
    with pytest.raises(UserError, match="big-endian"):
        read_state_dict(write_zip(tmp_path / "x.pth", state, storages, byteorder=b"big"))
    complex_numbers = Storage("ComplexFloatStorage", "0", np.zeros(3))
    with pytest.raises(UserError, match="torch.ComplexFloatStorage, which is not supported"):
        read_state_dict(write_zip(tmp_path / "x.pth", {"a": tensor(complex_numbers, 0, (3,), (1,))}, [complex_numbers]))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5, 6), (6, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (23, (2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (-1, 2), (1, 1)),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, example, offset, shape, strides):
    _, storages, _ = example
    with pytest.raises(UserError, match="is damaged"):
        read_state_dict(write_zip(tmp_path / "x.pth", {"a": tensor(storages[0], offset, shape, strides)}, storages))

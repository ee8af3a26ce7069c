import errno
import os
from dataclasses import fields

import numpy as np
import pytest

from deperceiver_jax.data.datasets import index as index_room
from deperceiver_jax.data.datasets.index import Index
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError


@pytest.fixture
def built(monkeypatch):
    """How often an index was made from the records."""
    calls, build = [], index_room.build

    def counted(prepared, split, **settings):
        calls.append(split)
        return build(prepared, split, **settings)

    monkeypatch.setattr(index_room, "build", counted)
    return calls


def _index_file(folder):
    return next(folder.rglob("index_train.npz"))


def test_the_index_is_made_once_and_comes_back_equal(coco_folder, built):
    coco_folder.write([coco_folder.annotation(1, 3, [1, 2, 3.25, 4], area=2.5)])
    first = open_source(coco_folder.config(), "train")
    second = open_source(coco_folder.config(), "train")
    assert built == ["train"]
    file = _index_file(coco_folder.prepared)
    assert file.stat().st_mode == (file.parent / "dataset_info.json").stat().st_mode  # others may read it, too
    for field in fields(Index):
        ours, theirs = getattr(first._index, field.name), getattr(second._index, field.name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert not list(coco_folder.prepared.rglob("*.tmp"))


def test_an_index_that_cannot_be_read_is_made_anew(coco_folder, built, caplog):
    coco_folder.write()
    open_source(coco_folder.config(), "train")
    file = _index_file(coco_folder.prepared)
    file.write_bytes(file.read_bytes()[:100])
    assert len(open_source(coco_folder.config(), "train")) == 2
    assert built == ["train", "train"]
    assert "is made anew" in caplog.text


def test_an_index_of_other_data_is_made_anew(coco_folder, built):
    coco_folder.write()
    open_source(coco_folder.config(), "train")
    file = _index_file(coco_folder.prepared)
    stale = dict(np.load(file)) | {"fingerprint": "another", "image_ids": np.array([1, 2])}
    np.savez_compressed(file, **stale)
    assert open_source(coco_folder.config(), "train").image_ids.tolist() == [3, 7]
    assert built == ["train", "train"]


def test_a_read_only_directory_is_left_alone(coco_folder, built, monkeypatch, tmp_path):
    coco_folder.write()
    open_source(coco_folder.config(), "train")
    _index_file(coco_folder.prepared).unlink()
    prepared = next(coco_folder.prepared.rglob("dataset_info.json")).parent
    before = sorted(os.listdir(prepared))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    elsewhere = coco_folder.config(name="tfds", directory=str(prepared), prepared_directory=str(tmp_path / "elsewhere"))
    for _ in range(2):
        assert len(open_source(elsewhere, "train")) == 2
    assert built == ["train", "train"]  # once beside the data, once elsewhere
    assert sorted(os.listdir(prepared)) == before
    assert _index_file(tmp_path / "elsewhere").is_file()


def test_an_index_that_nobody_lets_us_write_is_kept_in_memory(coco_folder, built, monkeypatch, caplog):
    """A cache of another user's: it can be read, and that is enough."""

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    coco_folder.write()
    open_source(coco_folder.config(), "train")
    _index_file(coco_folder.prepared).unlink()
    before = coco_folder.leftovers()
    monkeypatch.setattr(index_room, "written_whole", denied)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for _ in range(2):
        assert len(open_source(coco_folder.config(), "train")) == 2
    assert built == ["train"] * 3
    assert coco_folder.leftovers() == before
    assert "index_train.npz cannot be written (Permission denied)" in caplog.text


def test_damaged_records_are_named(coco_folder):
    """Of a directory that somebody else prepared, and of one that is damaged in the middle, which no look tells."""
    coco_folder.write()
    config = coco_folder.config()
    open_source(config, "train")
    shard = next(coco_folder.prepared.rglob("*array_record*"))
    source, content = open_source(config, "train"), shard.read_bytes()
    start = content.index(source.image_bytes(0)[-40:])
    shard.write_bytes(content[:start] + b"\0" * 40 + content[start + 40 :])
    with pytest.raises(
        UserError, match=r"is damaged: record 0 cannot be read .* delete this folder and prepare it anew"
    ):
        open_source(config, "train").image_bytes(0)
    config.update(name="tfds", directory=str(shard.parent))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=f"is not whole: {shard.name} is cut"):
        open_source(config, "train")
    shard.unlink()
    with pytest.raises(UserError, match=f"is not whole: {shard.name} is missing"):
        open_source(config, "train")

"""Saving, keeping, finding and restoring; what damaged and foreign checkpoints get."""

import json
import os
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.runs.checkpoint_files import all_steps, best_step
from deperceiver_jax.runs.stored_detector import find_detector, load_params, save_params
from deperceiver_jax.training.checkpoint import Checkpoints, FailedSave, newest_whole
from deperceiver_jax.training.train_state import inference_arrays


def write_scores(workdir, scores):
    lines = [{"step": 1, "split": "train", "loss": 3.0}]
    lines += [{"step": step, "split": "validation", "AP": ap} for step, ap in scores.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 9, "AP"')  # in the middle of writing


def save_steps(run, workdir, steps, *, keep=2):
    checkpoints = Checkpoints(workdir, keep=keep)
    state = run.plan.initialize()
    for step in range(1, max(steps) + 1):
        state, _ = run.train(state, step - 1, step)
        if step in steps:
            checkpoints.save(state, {"window": {"count": step, "sums": {"loss": 0.1}}})
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    run, workdir = tiny(2, ema_decay=0.5), tmp_path_factory.mktemp("run")
    return run, workdir, save_steps(run, workdir, [3])


@pytest.fixture
def saved(original, tmp_path):
    """(run, workdir with a checkpoint of step 3, its state); the workdir is this test's own."""
    run, workdir, state = original
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    return run, tmp_path, state


def test_restores_the_same_bits_onto_any_mesh(tiny, saved, same):
    _, workdir, state = saved
    for devices in (2, 1, 8):
        plan = tiny(devices, ema_decay=0.5).plan
        checkpoints = Checkpoints(workdir, keep=2)
        restored, progress = checkpoints.restore(3, plan.abstract)
        checkpoints.close()
        same(jax.device_get(restored), jax.device_get(state))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, plan.abstract)
        assert progress == {"window": {"count": 3, "sums": {"loss": 0.1}}}


def test_what_muon_remembers_is_restored(tiny, tmp_path, same):
    state = save_steps(tiny(2, name="muon"), tmp_path, [2])
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored, _ = checkpoints.restore(2, tiny(8, name="muon").plan.abstract)
    checkpoints.close()
    same(jax.device_get(restored), jax.device_get(state))
    assert any(np.any(x) for x in jax.tree.leaves(restored.opt_state[1].inner_states["muon"].inner_state[0].mu))


def test_keeps_the_newest_and_the_best(tiny, tmp_path):
    write_scores(tmp_path, {2: 0.5, 3: 0.4})
    save_steps(tiny(), tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert all_steps(tmp_path) == [2, 4, 5]
    assert best_step(tmp_path, all_steps(tmp_path)) == 2
    assert find_detector(tmp_path).step == 5
    assert find_detector(tmp_path, "best").items == tmp_path / "checkpoints" / "2"
    assert find_detector(tmp_path, "4").step == 4
    assert find_detector(tmp_path / "checkpoints" / "4").directory == tmp_path
    with pytest.raises(UserError, match=r"has no checkpoint '3'; it has \[2, 4, 5\], latest and best"):
        find_detector(tmp_path, "3")


def test_a_save_that_was_cut_off_is_ignored_and_removed(saved):
    run, workdir, state = saved
    partial = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "3", partial)
    assert all_steps(workdir) == [3]
    checkpoints = Checkpoints(workdir, keep=2)
    four = jax.device_put(np.int32(4), state.step.sharding)
    checkpoints.save(state._replace(step=four), {"window": {"count": 4, "sums": {}}})
    checkpoints.close()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]


def test_saving_a_step_twice_keeps_the_first(saved):
    run, workdir, state = saved
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(state, {"window": {"count": 0, "sums": {}}})
    checkpoints.close()
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.restore(3, run.plan.abstract)[1]["window"]["count"] == 3
    checkpoints.close()


@pytest.mark.parametrize(
    "name", ["lr[1e-4]", "exp#1", "lr 50%", "what?", "a*", "50%20", r"a\b", "模型 ü", "a:b", "n" * 255]
)
def test_a_workdir_of_any_name(tiny, saved, name, same):
    """Saved, found, restored and read, also in a folder whose name looks like a pattern."""
    run, _, state = saved
    workdir = saved[1] / "in [here]" / name
    workdir.mkdir(parents=True)
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(state, {"window": 1})
    checkpoints.close()
    assert os.listdir(workdir) == ["checkpoints"] and newest_whole(workdir) == (3, {})
    checkpoints = Checkpoints(workdir, keep=2)
    same(jax.device_get(checkpoints.restore(3, run.plan.abstract)[0]), jax.device_get(state))
    checkpoints.close()
    arrays = load_params(find_detector(workdir).items)
    save_params(workdir / "weights of it", arrays, "", "")
    assert load_params(find_detector(workdir / "weights of it").items).keys() == arrays.keys()


def test_another_model_is_told_apart_by_its_parameters(tiny, saved):
    _, workdir, _ = saved
    checkpoints = Checkpoints(workdir, keep=2)
    with pytest.raises(UserError, match=r"checkpoints/3 holds another model: backbone/bias is \(8,\) there and \(9,\)"):
        checkpoints.restore(3, tiny(width=9, ema_decay=0.5).plan.abstract)
    checkpoints.close()


@pytest.mark.parametrize("part", ["weights/manifest.ocdbt", "weights/d", "weights/_METADATA", "training/d"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "missing"])
def test_damage_is_one_sentence(saved, part, cut, capfd):
    run, workdir, _ = saved
    path = workdir / "checkpoints" / "3" / part
    if not cut:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in [path] if path.is_file() else path.rglob("*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    checkpoints = Checkpoints(workdir, keep=2)
    with pytest.raises(UserError, match="checkpoints/3/[a-z]* is damaged or incomplete: ."):
        checkpoints.restore(3, run.plan.abstract)
    checkpoints.close()
    assert capfd.readouterr().err == ""


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(saved, capfd):
    run, workdir, state = saved
    for step, damage in (("5", "progress/metadata"), ("7", "training/manifest.ocdbt")):
        shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / step)
        (workdir / "checkpoints" / step / damage).unlink()
    start, damaged = newest_whole(workdir)
    assert start == 3 and sorted(damaged) == [5, 7]
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.set_aside(damaged, start)
    err = capfd.readouterr().err
    assert f"It is {workdir}/checkpoints/7.damaged now, and the run continues from step 3." in err
    assert err.count("warning: ") == 2
    assert all_steps(workdir) == [3] and checkpoints.latest_step() == 3
    five = jax.device_put(np.int32(5), state.step.sharding)
    checkpoints.save(state._replace(step=five), {})
    checkpoints.close()
    assert newest_whole(workdir) == (5, {})
    assert newest_whole(workdir / "nowhere") == (0, {})


@pytest.fixture
def full_disk(tiny, tmp_path):
    """(Checkpoints with step 1, a state to save): from here on the system takes no file of more than 16 kB."""
    state, limits = tiny(width=8192).plan.initialize(), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state._replace(step=np.int32(1)), {})
    assert checkpoints.latest_step() == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    yield checkpoints, state._replace(step=np.int32(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_is_one_sentence(full_disk, capfd):
    checkpoints, state = full_disk
    sentence = r"cannot be written to .*: File too large \(it needs [\d.]* MB\); the newest one there is of step 1\."
    with pytest.raises(FailedSave, match=sentence), checkpoints:
        checkpoints.save(state, {})
    assert capfd.readouterr().err == ""
    assert os.listdir(checkpoints.directory) == ["1"] and newest_whole(checkpoints.workdir) == (1, {})


def test_a_disk_that_fills_during_a_save_keeps_the_checkpoint_before(full_disk, monkeypatch):
    """Orbax's threads print tracebacks besides."""
    checkpoints, state = full_disk
    monkeypatch.setattr(Checkpoints, "_require_space", lambda *_: None)
    checkpoints.save(state, {})
    with pytest.raises(FailedSave, match=r": File too large; the newest one there is of step 1\."):
        checkpoints.latest_step()
    assert newest_whole(checkpoints.workdir) == (1, {})


def test_load_params_takes_the_average(saved):
    _, workdir, state = saved
    arrays = load_params(find_detector(workdir).items)
    expected = inference_arrays(state)
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, expected[path])


def test_saved_params_are_found_and_loaded(tmp_path):
    arrays = {"backbone/0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "head/bias": np.zeros(2, np.float32)}
    target = tmp_path / "imported" / "detr"
    save_params(target, arrays, '{"a": 1}\n', '{"num_slots": 0}\n')
    stored = find_detector(target)
    assert (stored.directory, stored.step) == (target, None)
    assert (target / "config.json").read_text() == '{"a": 1}\n'
    loaded = load_params(stored.items)
    assert loaded.keys() == arrays.keys()
    np.testing.assert_array_equal(loaded["backbone/0/kernel"], arrays["backbone/0/kernel"])
    with pytest.raises(UserError, match="exists already"):
        save_params(target, arrays, "", "")


@pytest.mark.parametrize("name", ["cups", "12", "²", "[7]"])
def test_weights_lie_in_any_folder(tmp_path, monkeypatch, name):
    """Also in one that is called as the folder of a run's checkpoints, and as a step there."""
    target = tmp_path / "checkpoints" / name
    save_params(target, {"bias": np.ones(3, np.float32)}, "{}", "{}")
    assert find_detector(target) == (target, target, None)
    assert load_params(target)["bias"].tolist() == [1, 1, 1]
    monkeypatch.chdir(target)
    assert find_detector(Path(".")).directory == Path(".")


def test_a_directory_without_a_detector(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint and no weights"):
        find_detector(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a directory"):
        find_detector(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nnn is not a directory"):
        find_detector(tmp_path / ("n" * 300))

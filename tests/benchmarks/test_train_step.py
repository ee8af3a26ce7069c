"""The benchmark of the training step: what its table says follows from the times, and its peers are the same models."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import train_step, train_step_jax
from configs import deformable_detr, demo, deperceiver, detr
from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import parse_config


def test_the_fixed_assignment_is_one():
    box_valid = jnp.arange(7)[None] < jnp.array([3, 7])[:, None]
    assignment = jax.jit(lambda cost: train_step_jax.fixed_assignment(cost, box_valid, backend="", mesh=None))(
        jnp.ones((2, 2, 5, 7))
    )
    assert assignment.query.shape == assignment.matched.shape == (2, 2, 7)
    assert assignment.matched.sum(-1).tolist() == [[3, 5], [3, 5]]
    assert assignment.query[0, 1, :5].tolist() == [0, 1, 2, 3, 4]
    assert assignment.query.max() < 5


MACHINE = {
    "device": "a device",
    "cores": 2,
    "versions": "jax 1",
    "peak_flops": {"float32": 1e9, "bfloat16": 2e9},
}


def _row(**fields):
    row = {"config": "configs/detr.py:r50", "size": "64x64", "precision": "float32", "job": "x", "loss": 1.0}
    return row | {"implementation": "x", "fastest": 0.1, "compile_seconds": 3.2, "peak_bytes": 2**29} | fields


def test_the_table_compares_with_the_best_peer_of_equal_precision():
    ours = _row(
        seconds=0.2,
        unmatched_seconds=0.19,
        model_flops=1e8,
        useful_flops=5e7,
        useful_share=0.5,
        xla_flops=2e7,
        peak_bytes=2**30,
    )
    peers = [_row(seconds=0.5), _row(seconds=0.4), _row(seconds=0.1, precision="bfloat16"), _row(failed="out of time")]
    left_out = [{"config": "configs/smca.py:r50", "size": "bucketed", "precision": "float32", "job": "this package"}]
    report = train_step.table([ours, *peers], left_out, 8, MACHINE, {"versions": "torch 2"})
    lines = report.splitlines()
    assert len({line.count("|") for line in lines[:7]}) == 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "detr.py:r50",
        "64x64",
        "float32",
        "x",
        "40.00",
        "200.0 (100.0)",
        "5.0%",
        "1.00",
        "25.0%",
        "3",
        "2.00",
    ]
    assert "| 20.00 | 400.0 (100.0) | - | 0.50 | 12.5% | 3 | - |" in lines[4]
    assert "out of time" in report and "50.0% of the pixels" in report and "sees 20%" in report
    assert "want of time (--minutes): configs/smca.py:r50 bucketed float32 this package." in report


def test_peers_are_the_same_models():
    same = train_step.peer_model(detr.get_config("r50"))
    assert (same["num_queries"], same["encoder_ffn_dim"], same["decoder_layers"], same["depth"]) == (100, 2048, 6, 50)
    assert same["frozen_stages"] == 2
    assert same["attention_dropout"] == same["activation_dropout"] == same["dropout"] == 0.1
    assert same == train_step.peer_model(
        parse_config(["benchmark", "--config=detr:r50"])
    )  # locked, as programs have it
    same = train_step.peer_model(deformable_detr.get_config("r50_two_stage"))
    assert (same["num_feature_levels"], same["two_stage"], same["two_stage_num_proposals"]) == (4, True, 300)
    assert train_step.peer_model(deformable_detr.get_config("r50_single_scale"))["num_feature_levels"] == 1
    for config in (detr.get_config("r50_dc5"), deperceiver.get_config("r50_16"), demo.get_config("detr")):
        assert train_step.peer_model(config) is None


def test_a_peer_that_trains_other_parameters_is_no_peer():
    ours = _row(job="this package", trained_parameters=2000)
    peer = _row(job="eager", trained_parameters=2000)
    assert train_step.comparable(peer, [ours, peer]) == peer
    frozen = peer | {"trained_parameters": 1000}
    compared = train_step.comparable(frozen, [ours, frozen])
    assert compared["failed"] == "it trains 1,000 parameters, this package 2,000"
    assert (compared["job"], "seconds" in compared) == ("eager", False)
    assert train_step.comparable(frozen, [ours | {"size": "32x32"}, frozen]) == frozen  # nothing to compare with
    late = _row(job="eager", failed="out of time")
    assert train_step.comparable(late, [ours, late]) == late


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--precisions=float16", "--precisions has 'float16'; it takes bfloat16, float32."),
        ("--torch_modes=fast", "--torch_modes has 'fast'; it takes eager, channels_last, compiled."),
    ],
)
def test_flags_are_checked_before_anything_runs(flag, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        train_step.main(["train_step.py", flag])


def test_sizes_are_checked():
    for size in ("800", "0x32", "axb"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            train_step.batch_maker(size, 2)


def test_without_pytorch_one_sentence_says_so(capsys, tmp_path):
    program = Path(train_step.__file__).with_name("train_step_torch.py")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    python = ["env", f"PYTHONPATH={tmp_path}", sys.executable, str(program)]
    assert train_step.find_peer(python, "cpu", float("inf")) == {}
    assert capsys.readouterr().out == f"No PyTorch peer: {sys.executable} has no torch.\n"
    assert train_step.find_peer(["/no/such/python"], "cpu", float("inf")) == {}
    assert capsys.readouterr().out == "No PyTorch peer: /no/such/python: No such file or directory.\n"


def test_a_program_that_was_killed_says_so():
    killed = [sys.executable, "-c", "import os, sys; print('a warning', file=sys.stderr); os.kill(os.getpid(), 9)"]
    assert train_step.call(killed, float("inf")) == {"failed": "ended by signal 9"}


def test_a_program_that_takes_too_long_is_stopped():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert train_step.call(sleeper, time.monotonic() + 0.5) == {"failed": "out of time"}

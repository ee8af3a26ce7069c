"""The command: a real step compiled for this machine, and what it says when something does not fit or is not there."""

import sys
from pathlib import Path

import pytest

from deperceiver_jax.preflight import __main__ as program
from deperceiver_jax.preflight import preflight
from deperceiver_jax.preflight.chips import CHIPS, GIB
from deperceiver_jax.preflight.program import Cost, compile_step
from deperceiver_jax.preflight.report import bound
from deperceiver_jax.program.command_line import run

pytestmark = pytest.mark.slow

TINY = f"--config={Path(__file__).resolve().parent.parent / 'tiny_training.py'}"


def command(*arguments):
    return run(program.main, ["preflight", *arguments])


@pytest.fixture(scope="module")
def tiny():
    """(the cost of one real step on eight devices, what the command printed)."""
    with pytest.MonkeyPatch.context() as patch:
        costs, lines = [], []
        patch.setattr(preflight, "compile_step", lambda *step: costs.append(compile_step(*step)) or costs[-1])
        patch.setattr("builtins.print", lambda *text, **_: lines.extend(text))
        status = command(TINY, "--topology=local", "--sizes=64x96", "--config.data.batch_size=8", "--bytes")
    assert status == 0, lines
    return costs[0], "\n".join(lines)


def test_a_table_of_the_real_step(tiny):
    cost, printed = tiny
    assert "8 x cpu, batches of 8 (1 a chip), float32, attention auto" in printed
    row = next(line for line in printed.splitlines() if "64x96" in line)
    assert "does not fit" not in row
    parameters = 4 * 100_000  # the model has more than so many bytes of parameters, moments and average
    assert cost.arguments > parameters
    assert cost.temporaries > 0 and cost.memory_bytes > cost.arguments
    assert cost.interconnect_bytes > 2 * parameters * 7 // 8 // 4  # the gradients of all devices are added
    assert cost.flops > 0


def test_bytes_lists_the_parts_of_the_real_step(tiny):
    cost, printed = tiny
    assert sum(part.bytes for part in cost.parts) == cost.memory_bytes
    listed = printed.split("Of the GB moved at 64x96:\n")[1].splitlines()
    assert listed[0].split() == ["GB", "moved", "share", "pass", "part"]
    assert {part.backward for part in cost.parts if "ResNet" in part.name} == {True, False}
    shares = [float(line.split()[1]) for line in listed[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares[:-1] == sorted(shares[:-1], reverse=True) and shares[-2] >= 0.95


def test_what_does_not_fit_ends_with_one_sentence(tiny, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "compile_step", lambda *_: tiny[0])
    assert command(TINY, "--sizes=64x96", "--config.data.batch_size=8", "--hbm_gib=0.0001") == 1
    out, err = capsys.readouterr()
    assert "does not fit" in out
    assert "config.data.batch_size 8 does not fit 0.0001 GiB a chip on local; and not even one image a chip does" in err


def linear(config, devices, bucket, num_boxes, *, most=10**9):
    """A step that needs 1 GiB and 0.25 GiB an image, 0.1 GiB rematerialised; the compiler gives up beyond `most`."""
    images = config.data.batch_size // len(devices)
    each = 0.1 if config.rematerialize else 0.25
    return Cost(GIB, int(images * each * GIB), 0, images <= most, 1.0, 1, 1, 0, 0.0)


def test_the_largest_batch_is_named(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "compile_step", linear)
    assert command(TINY, "--sizes=64x96", "--config.data.batch_size=160", "--hbm_gib=4") == 1
    sentence = "batch_size 160 does not fit 4 GiB a chip on local; the largest that fits is 96 (12 a chip)"
    assert sentence in capsys.readouterr().err


def test_suggest_says_what_rematerialisation_gives(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "compile_step", linear)
    assert command(TINY, "--sizes=64x96", "--config.data.batch_size=8", "--hbm_gib=4", "--suggest") == 0
    assert "Largest batch per chip: 12 as it is, 30 with --config.rematerialize=True (96 and 240 over 8 chips)." in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--topology=v5e", "--topology is 'v5e'; it can be local, or a chip (v4, v5e, v5p, v6e) and a shape"),
        ("--topology=h100:8", "--topology is 'h100:8'"),
        ("--topology=v5e:4xfour", "--topology is 'v5e:4xfour'"),
        ("--topology=0xv5e:4x4", "--topology is '0xv5e:4x4'"),
        ("--topology=2v5e:4x4", "as in v5e:4x4, of several slices 2xv5e:4x4."),
        ("--sizes=big", "--sizes has 'big'; a size is HEIGHTxWIDTH, as in 832x1344."),
        ("--suggest", "--suggest needs --hbm_gib"),
    ],
)
def test_mistakes_are_one_sentence(argument, sentence, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "compile_step", linear)
    sizes = [] if argument.startswith("--sizes") else ["--sizes=64x96"]
    assert command(TINY, *sizes, "--config.data.batch_size=8", argument) == 1
    assert sentence in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert command(TINY, "--topology=v5e:2x2") == 1
    error = capsys.readouterr().err
    assert error == (
        "error: Compiling for a TPU needs its compiler, which is not installed: pip install '.[preflight]'.\n"
    )


def test_buckets_without_a_data_set_are_those_of_commonest_sizes():
    from configs.deperceiver import get_config

    buckets, num_boxes = preflight.plan_buckets(get_config("r50_16"), [])
    assert 2 <= len(buckets) <= 8
    assert (800, 1344) in buckets and (800, 1088) in buckets  # images of 800 x 1333 and 800 x 1066, on a grid of 32
    assert num_boxes == 100


def test_bound_of_a_step():
    cost = Cost(0, 0, 0, True, 197e12, 819_000_000_00, 0, 0, 0.0)
    assert bound(cost, CHIPS["v5e"]) == ("1000.0 ms", "FLOP/s")
    assert bound(cost._replace(flops=1.0), CHIPS["v5e"]) == ("100.0 ms", "memory")
    assert bound(cost._replace(interconnect_bytes=240_000_000_000), CHIPS["v5e"]) == ("1200.0 ms", "links")
    between = cost._replace(network_bytes=6_250_000_000)
    assert bound(between, CHIPS["v5e"]) == ("2000.0 ms", "network")
    assert bound(between, CHIPS["v4"]) == bound(cost, CHIPS["v4"])  # whose network has no published figure
    assert bound(cost, None) == ("-", "-")


def test_published_figures():
    """Google's pages of each chip (see the table's sources), by hand."""
    figures = {
        name: (chip.hbm_gib, chip.peak_flops / 1e12, chip.bandwidth / 1e9, chip.links * 8 / 1e9)
        for name, chip in CHIPS.items()
    }
    assert figures == {
        "v4": (32, 275, 1200, 2400),
        "v5e": (16, 197, 819, 1600),
        "v5p": (95, 459, 2765, 4800),
        "v6e": (32, 918, 1600, 3200),
    }

"""How a run grows: the arithmetic by hand, against what compilers said of larger topologies, and the command."""

from pathlib import Path

import pytest

from deperceiver_jax.preflight import __main__ as program
from deperceiver_jax.preflight import preflight, scaling
from deperceiver_jax.preflight.chips import CHIPS
from deperceiver_jax.preflight.program import Cost
from deperceiver_jax.preflight.scaling import Rates, Work, describe, limits, scale
from deperceiver_jax.program.command_line import run

TINY = f"--config={Path(__file__).resolve().parent.parent / 'tiny_training.py'}"
V5E = CHIPS["v5e"]
# A chip's share of DETR-R50's step at 8 images of 832 x 1344 on v5e:4x4, as docs/preflight.md has it.
DETR = Cost(0, 0, 0, True, 4.81e12, 40_700_000_000, 160_000_000, 0, 0.0)
COCO = Work(118_287, 5_000, 8, 1.7e11, 500_000_000, 0, 0, 300, 4)
RATES = Rates(140, 100e6, 350)


def rows_of(cost=DETR, chip=V5E, work=COCO, rates=RATES, compiled_for=16):
    return {row.chips: row for row in scale(cost, compiled_for, chip, work, rates)}


def test_a_row_by_hand():
    row = rows_of()[16]
    assert (row.hosts, row.slices, row.batch, row.bound_by) == (4, 1, 128, "memory")
    assert row.bounds == pytest.approx({"FLOP/s": 4.81 / 197, "memory": 40.7 / 819, "links": 0.16 / 200})
    assert row.step == pytest.approx(40.7 / 819) and row.epoch == pytest.approx(924 * row.step)
    assert row.host_rate == pytest.approx(4 * 8 / row.step)  # images/s of four chips
    forward = row.step * 8 * 1.7e11 / 4.81e12
    loaded = 5000 / 4 / (4 * 140)
    assert row.evaluation == pytest.approx(max(40 * forward, loaded) + 4.5)  # 40 batches of 128
    assert row.checkpoint == 5
    assert row.in_steps == pytest.approx(row.epoch / (row.epoch + row.evaluation))


def test_what_is_sent_is_what_larger_topologies_were_compiled_to_send():
    """docs/preflight.md: 0.16 GB on 4x4 became 0.17 on 16x16; of 2 and 4 slices of 4x4, 0.006 and 0.009 GB."""
    rows = rows_of()
    assert rows[256].bounds["links"] * 200 == pytest.approx(0.17, abs=0.005)
    assert "network" not in rows[256].bounds
    small = V5E._replace(slice_chips=16)
    found = {slices: rows_of(chip=small)[16 * slices].bounds["network"] * 3.125 for slices in (2, 4)}
    assert found == pytest.approx({2: 0.006, 4: 0.009}, abs=0.001)
    assert rows_of(chip=small)[64].bounds["links"] == rows[16].bounds["links"]
    assert rows_of()[4].bounds["links"] * 200 == pytest.approx(0.16 * (3 / 4) / (15 / 16))


def test_compute_and_memory_stay_and_the_rest_shrinks_or_not():
    rows = list(rows_of().values())
    assert [row.chips for row in rows] == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert [row.slices for row in rows[-3:]] == [1, 2, 4]
    assert len({row.bounds["memory"] for row in rows}) == len({row.host_rate for row in rows}) == 1
    assert [row.in_steps for row in rows] == sorted((row.in_steps for row in rows), reverse=True)
    assert rows[0].in_steps > 0.9 > 0.2 > rows[-1].in_steps
    assert all(row.evaluation > 4.5 for row in rows)


def test_where_it_stops_and_what_helps():
    said = limits(list(rows_of().values()), V5E, COCO, RATES)
    assert said[0].startswith("Sending never bounds a step: links take 2 % of it at most, the network")
    workers = "The loader of a host needs 5 workers for 644 images/s, a CPU each, at any number of chips: "
    assert said[1] == f"{workers}--config.data.num_workers=5 instead of 4."
    late = next(row for row in rows_of().values() if row.in_steps < 0.8)
    assert said[2].startswith(f"From {late.chips} chips on less than 80% of the time goes into steps")

    every = int(said[2].split("eval_every=")[1].split(" ")[0])
    steps = 300 * rows_of()[1024].epoch
    assert 200 < steps < 350 < 300 * rows_of()[512].epoch
    assert said[3].startswith(f"From 1024 chips on the steps of all 300 epochs take {steps:.0f} s, less than compil")

    rarer = COCO._replace(eval_every=every, checkpoint_every=every)
    assert 0.8 <= rows_of(work=rarer)[1024].in_steps < 0.9
    fewer = COCO._replace(eval_every=every // 2, checkpoint_every=every // 2)
    assert rows_of(work=fewer)[1024].in_steps < 0.8


def test_other_limits():
    sending = limits(list(rows_of(DETR._replace(memory_bytes=10**8, flops=1e9)).values()), V5E, COCO, RATES)
    assert sending[0].startswith("From 4 chips on, links bound a step: more images a chip")
    slow = Rates(3, 100e6, 350)
    assert (
        "would need 215 workers, and it has 112 CPUs" in limits(list(rows_of(rates=slow).values()), V5E, COCO, slow)[1]
    )
    few = COCO._replace(train_images=500)
    rows = list(rows_of(work=few).values())
    assert [row.batch for row in rows] == [32, 64, 128, 256]
    assert "64 chips would need more images for one batch than an epoch has." in limits(rows, V5E, few, RATES)
    v4 = CHIPS["v4"]._replace(slice_chips=256)
    said = limits(list(rows_of(chip=v4).values()), v4, COCO, RATES)
    assert said[0] == "Links never bound a step; no rate is published of the network between 4 slices."


def test_a_checkpoint_is_written_while_the_run_goes_on():
    never = COCO._replace(eval_every=-1)
    assert rows_of(work=never)[64].in_steps > 0.99
    slow = rows_of(work=never, rates=Rates(140, 1e6, 350))[64]  # 500 s
    assert slow.in_steps == pytest.approx(slow.epoch / 500)


def test_the_text_says_what_is_what():
    text = describe(list(rows_of().values()), V5E, COCO, RATES, "v5e:4x4, 832x1344")
    for part in (
        "Compiled for v5e:4x4, 832x1344: operations, bytes moved, bytes sent.",
        "Published (cloud.google.com/tpu/docs/v5e): a chip's rates, 4 chips and 112 CPUs a host, 256 chips a slice.",
        "Measured elsewhere: 140 images/s by a loader worker, 100 MB/s of a checkpoint (0.50 GB)",
        "The rest is arithmetic",
    ):
        assert part in text
    table = [line.split() for line in text.splitlines() if line.strip().startswith(("16 ", "1024 "))]
    assert table[0][:8] == ["16", "4", "1", "128", "24.42", "49.69", "0.80", "-"]
    assert table[1][:4] == ["1024", "256", "4", "8192"] and table[1][8] == "memory"
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) < 140


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology=local"], "--scaling needs one slice of several chips, as in v5e:4x4; --topology is local."),
        (["--worker_rate=0"], "worker_rate"),
        (["--checkpoint_rate=0"], "checkpoint_rate"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys):
    assert run(program.main, ["preflight", TINY, "--scaling", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.fixture
def on_v5e(monkeypatch):
    """This machine's eight devices, called chips of v5e; a step that costs what DETR's does."""
    import jax

    monkeypatch.setattr(preflight, "open_topology", lambda name: (V5E, jax.devices()))
    monkeypatch.setattr(preflight, "compile_step", lambda *step: DETR)


@pytest.mark.slow
def test_the_command_reckons_from_the_real_detection_step(on_v5e, capsys, monkeypatch):
    works = []
    monkeypatch.setattr(scaling, "describe", lambda rows, chip, work, *rest: works.append(work) or "told")
    arguments = ["--topology=v5e:2x4", "--sizes=64x96", "--config.data.batch_size=16"]
    assert run(program.main, ["preflight", TINY, *arguments, "--scaling"]) == 0
    assert "told" in capsys.readouterr().out
    (work,) = works
    assert work.images_a_chip == 2 and (work.train_images, work.eval_images) == (118_287, 5_000)
    assert work.state_bytes > 400_000 and 1e6 < work.detect_flops < 1e10
    assert run(program.main, ["preflight", TINY, *arguments, "--scaling", "--config.mesh.model=2"]) == 1
    assert "config.mesh.model is 2." in capsys.readouterr().err

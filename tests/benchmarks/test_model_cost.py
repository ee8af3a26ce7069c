"""What a detector costs, printed by the program; how operations are counted, preflight's tests prove."""

import re

from benchmarks import model_cost
from deperceiver_jax.program.command_line import run


def cost(*arguments) -> int:
    return run(model_cost.main, ["model_cost", "--config=configs/demo.py:deformable_detr", *arguments])


def test_four_times_the_pixels_cost_up_to_four_times_as_much(capsys):
    """Queries cost the same, and figures are rounded; parameters do not change."""
    printed = []
    for size in ("256x256", "512x512"):
        assert cost(f"--size={size}") == 0
        printed.append(capsys.readouterr().out)
    parameters, operations = ([re.search(rf"{name}: ([0-9.]+)", x)[1] for x in printed] for name in ("rs", "pass"))
    assert parameters[0] == parameters[1]
    assert 2.5 < float(operations[1]) / float(operations[0]) <= 4


def test_size_is_checked(capsys):
    assert cost("--size=800") == 1
    assert "--size is 800; it is to be like 800x1066." in capsys.readouterr().err

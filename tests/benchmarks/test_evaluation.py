"""The benchmark of evaluation on a small split: every part runs, and pycocotools has the metric's numbers."""

import re

import pytest

from benchmarks import evaluation


@pytest.mark.parametrize("part", evaluation.PARTS)
def test_parts(part, capsys):
    evaluation.main([f"--part={part}", "--images=30", "--boxes=120", "--detections=20"])
    printed = capsys.readouterr().out
    seconds, peak, before = map(
        float, re.search(r": ([\d.]+) s, .*; peak (\d+) MiB, (\d+) MiB before", printed).groups()
    )
    assert seconds > 0 and peak >= before > 0
    if part == "pycocotools":
        assert float(re.search(r"the metric's: (.*)", printed)[1]) < 1e-12

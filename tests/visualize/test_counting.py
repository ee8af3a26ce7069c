"""Pictures with many objects of one class, and how many of them are found."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.data.datasets.shapes import drawing
from deperceiver_jax.data.datasets.shapes.crowds import Crowds
from deperceiver_jax.errors import UserError
from deperceiver_jax.program.command_line import run
from deperceiver_jax.structures import Detections
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize import counting
from deperceiver_jax.visualize.counting import count_found, parse_counts
from tests.visualize.conftest import tiny_config

CLASSES = ClassMap.from_categories([(i + 1, name) for i, name in enumerate(drawing.CLASSES)])
STAR = drawing.CLASSES.index("star")


@pytest.fixture(scope="module")
def crowds():
    return Crowds(drawing.RECIPES["standard"], STAR, [3, 20], 2)


def test_crowds_have_as_many_as_were_asked_for(crowds):
    """All of one class, none of them the same picture, and the same ones every time."""
    assert [len(picture.labels) for picture in crowds.pictures] == crowds.counts.tolist() == [3, 3, 20, 20]
    assert all((picture.labels == STAR).all() for picture in crowds.pictures)
    assert len({crowds.image_bytes(i) for i in range(len(crowds))}) == 4
    again = Crowds(drawing.RECIPES["standard"], STAR, [20], 2)
    assert again.image_bytes(1) == crowds.image_bytes(3)
    boxes, labels = crowds.targets(2)
    height, width = crowds.sizes[2].tolist()
    assert len(boxes) == len(labels) == 20 and boxes.min() >= 0 and (boxes.max(axis=0) <= [width, height] * 2).all()


def test_more_than_fit_is_a_sentence():
    stamp = dataclasses.replace(drawing.RECIPES["small"], heights=(16, 16), widths=(16, 16), magnification=16.0)
    with pytest.raises(UserError, match="40 shapes do not fit into one picture of this data set"):
        Crowds(stamp, 0, [40], 1)


def test_what_is_found_is_counted(crowds):
    """Of 3: all, one of them twice. Of 20: half, five of them below the threshold."""
    slots = 24
    boxes, labels = np.zeros((4, slots, 4)), np.full((4, slots), STAR)
    scores = np.full((4, slots), 0.01)
    for i in range(4):
        targets = crowds.targets(i)[0]
        some = len(targets) if i < 2 else 10
        boxes[i, :some], scores[i, :some] = targets[:some], 0.9
        if i < 2:
            boxes[i, some], scores[i, some] = targets[0], 0.8
        else:
            scores[i, :5] = 0.3
    few, many = count_found(crowds, Detections(scores, labels, boxes), CLASSES, 0.5)
    assert few == (3, 3.0, 3, 3, 1.0)
    assert many == (20, 5.0, 5, 5, 0.0)
    (none, _) = count_found(crowds, Detections(scores, np.zeros_like(labels), boxes), CLASSES, 0.5)
    assert none.found == 0 and none.wrong == 4


def test_counts_are_whole_numbers():
    assert parse_counts(["24", "6", "6"]) == [6, 24]
    for wrong in (["0"], ["a"], ["1.5"]):
        with pytest.raises(UserError, match="is not a list of whole numbers from 1"):
            parse_counts(wrong)


def test_the_command(store_detr, tiny_run, behind_patches, tmp_path, monkeypatch, capsys):
    config = tiny_config()
    config.data.update(name="shapes", eval_scale=64, eval_max_size=96, num_workers=0)
    weights = store_detr(config, CLASSES)
    monkeypatch.setattr(counting, "most_in_training", lambda loaded, label: 5)  # for which 4000 pictures are drawn
    output = tmp_path / "counting.png"

    def draw(*arguments):
        return run(visualize.main, ["visualize", "counting", f"--output={output}", *map(str, arguments)])

    assert draw(f"--weights={weights}", "--counts=2,12", "--pictures=2", "--label=star") == 0, capsys.readouterr().err
    assert "up to 12 objects of class star" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.width > 1000
    assert draw(f"--weights={weights}", "--label=giraffe") == 1
    assert "--label is 'giraffe'; it can be disk, square, triangle" in capsys.readouterr().err
    monkeypatch.undo()
    assert draw(f"--workdir={tiny_run}") == 1
    assert "counting draws pictures of the built-in data set, shapes" in capsys.readouterr().err

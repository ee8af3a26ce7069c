"""Several runs at one object: each shows the query that answers for it."""

import numpy as np
from PIL import Image

from deperceiver_jax.data import open_source
from deperceiver_jax.program.command_line import run
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.compare_attention import Object, best_query, own_objects
from tests.visualize.test_attention import tiny


def test_the_query_that_answers():
    """By overlap and score of the object's class together; where nothing overlaps, by score."""
    boxes = np.array([[0.3, 0.3, 0.2, 0.2], [0.32, 0.3, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]], np.float32)
    scores = np.array([[0.2, 0.9], [0.9, 0.1], [0.95, 0.0]])
    wanted = np.array([0.2, 0.2, 0.4, 0.4])
    assert best_query(scores, boxes, Object(wanted, 0)) == 1
    assert best_query(scores, boxes, Object(wanted, 1)) == 0
    assert best_query(scores, boxes, Object(np.array([0.6, 0.0, 0.7, 0.1]), 0)) == 2


def test_objects_of_an_example(rectangles):
    """In shares of the image; an image may have none."""
    (own,) = own_objects(rectangles, 3)
    assert own.label in (0, 1) and (own.box >= 0).all() and (own.box <= 1).all() and (own.box[2:] > own.box[:2]).all()
    counts = [len(own_objects(rectangles, example)) for example in range(10)]
    assert sorted(counts) == [0] + [1] * 9


def draw(*arguments):
    return run(visualize.main, ["visualize", "compare_attention", *map(str, arguments)])


def test_the_command(tiny_detr, store_detr, rectangles, tmp_path, capsys):
    """Two families, whose rows have panels of different kinds."""
    config = tiny("deperceiver")
    config.data.update(rectangles)
    other = store_detr(config, open_source(config.data, "validation").classes)
    output = tmp_path / "compared.png"
    assert draw(other, tiny_detr, "--example=3", f"--output={output}") == 0, capsys.readouterr().err
    with Image.open(output) as sheet:
        assert sheet.height > 700
    output = f"--output={tmp_path}/a.png"
    for arguments, sentence in (
        ([other, "--example=3", output], "name two workdirs or more"),
        ([other, tiny_detr, "--example=3"], "--output is needed"),
        ([other, tiny_detr, output], "Either --image or --example is needed"),
        ([other, other, "--example=3", output], "A workdir is given twice."),
        ([other, tiny_detr, "--example=3", output, "--config.seed=1"], "take no config"),
        ([other, tmp_path / "none", "--example=3", output], f"{tmp_path}/none is not a directory."),
    ):
        assert draw(*arguments) == 1
        assert sentence in capsys.readouterr().err

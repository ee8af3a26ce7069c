"""The map of query slots: colours say size and shape, dots lie where boxes do, a slot keeps its column."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import deformable_detr, deperceiver_plus, detr
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import run
from deperceiver_jax.structures import Predictions
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.queries import SMALL, TALL, WIDE, answers_of_slots, box_colors, draw_slot, from_proposals


def test_colours_say_size_and_shape():
    """Shape is that of the box in pixels: a square of a wide image is no square there."""
    boxes = np.array([[0.5, 0.5, 0.01, 0.01], [0.5, 0.5, 1, 0.4], [0.5, 0.5, 0.4, 1], [0.5, 0.5, 0.7, 0.7]])
    small, wide, tall, square = box_colors(boxes, np.full((4, 2), 100)).astype(int)
    assert np.abs(small - SMALL).max() < 10
    np.testing.assert_array_equal([wide, tall], [WIDE, TALL])
    np.testing.assert_allclose(square, (np.array(WIDE) + TALL) / 2, atol=1)
    np.testing.assert_array_equal(box_colors(boxes[3:], np.array([[100, 200]]))[0], WIDE)


def test_a_dot_lies_at_the_centre_of_its_box():
    colors = np.array([[200, 0, 0], [0, 0, 200]], np.uint8)
    square = draw_slot(np.array([[0.25, 0.25, 0.1, 0.1], [0.75, 0.5, 0.2, 0.2]]), colors, side=200)
    for (x, y), color in {(50, 50): (200, 0, 0), (150, 100): (0, 0, 200), (50, 150): (248, 249, 250)}.items():
        np.testing.assert_allclose(square[y, x], color, atol=5)  # shrunk, with smooth edges


def test_slots_keep_their_order():
    """The boxes of the last layer as they are, with their best class, however low its score."""
    logits, boxes = jnp.zeros((2, 1, 3, 2)).at[1, 0, 1, 1].set(4.0), jnp.arange(24.0).reshape(2, 1, 3, 4)
    classification = build_classification(deformable_detr.get_config().loss)
    found = answers_of_slots(Predictions(logits, boxes), jnp.zeros((1, 2), int), classification=classification)
    np.testing.assert_array_equal(found.boxes, boxes[-1])
    np.testing.assert_array_equal(found.labels, [[0, 1, 0]])
    np.testing.assert_allclose(found.scores, [[0.5, 1 / (1 + np.exp(-4)), 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    "config, ranks",
    [(detr.get_config("r50"), False), (deformable_detr.get_config("r50_two_stage"), True)]
    + [(deperceiver_plus.get_config(), True), (deformable_detr.get_config("r50"), False)],
)
def test_slots_that_are_ranks(config: ConfigDict, ranks):
    assert from_proposals(config.model) == ranks


def draw(*arguments):
    return run(visualize.main, ["visualize", "queries", *map(str, arguments)])


def test_the_command(tiny_detr, tmp_path, capsys):
    output = tmp_path / "queries.png"
    assert draw(f"--weights={tiny_detr}", f"--output={output}", "--queries=4,0", "--score_threshold=0.001") == 0
    assert f"Wrote {output}: 2 of 6 slots of " in capsys.readouterr().out
    with Image.open(output) as sheet:
        assert sheet.width >= 560 and sheet.height > 300
    for wrong, sentence in (
        ("--queries=6", "--queries: the detector has the queries 0 to 5, not 6."),
        ("--queries=a", "--queries: a is not a list of numbers such as 3,17."),
        ("--slots=0", "--slots is 0; it must be at least 1."),
        ("--score_threshold=7", "--score_threshold is 7.0"),
        ("--split=test", "has no split"),
    ):
        assert draw(f"--weights={tiny_detr}", f"--output={output}", wrong) == 1
        assert sentence in capsys.readouterr().err

"""Pictures of where latents sit: dots at their centres, tails to where they were, a sheet for any detector."""

import jax.numpy as jnp
import numpy as np
from PIL import Image

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.program.command_line import run
from deperceiver_jax.structures import Predictions
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.draw_boxes import class_color
from deperceiver_jax.visualize.latents import draw_layer, follow, save_movement

CLASSES = ClassMap.from_categories([(1, "round"), (3, "square")])
BOXES = jnp.asarray(
    [[[[0.25, 0.25, 0.2, 0.2], [0.75, 0.5, 0.1, 0.1]]], [[[0.75, 0.25, 0.2, 0.2], [0.75, 0.5, 0.1, 0.1]]]]
)


def test_latents_start_at_the_best_proposals():
    proposals = Predictions(jnp.asarray([[[[0.0], [5.0], [2.0]]]]), jnp.asarray([[[[0.1] * 4, [0.2] * 4, [0.3] * 4]]]))
    predictions = Predictions(jnp.zeros((2, 1, 2, 4)), BOXES, proposals)
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.0, 0.3, 0.1, 0.2]])  # slots 0 and 2 are classes
    movement = follow(predictions, CLASSES, scores[:, : max(CLASSES.slots) + 2])
    assert movement.names == ["proposals", "layer 0", "layer 1"]
    np.testing.assert_allclose(movement.boxes[0, :, 0], [0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(movement.boxes[1:], BOXES[:, 0])
    slots = list(CLASSES.slots)
    np.testing.assert_array_equal(movement.labels, np.asarray(slots)[scores[:, slots].argmax(axis=1)])


def test_a_dot_has_a_tail_to_where_it_was():
    movement = follow(Predictions(jnp.zeros((2, 1, 2, 4)), BOXES), CLASSES, np.array([[0.9] * 4, [0.1] * 4]))
    assert movement.names == ["layer 0", "layer 1"]
    image = np.full((50, 50, 3), 128, np.uint8)
    first, second = (draw_layer(image, movement, layer, 0.5, long_side=200) for layer in (0, 1))
    color = class_color(int(movement.labels[0]))
    ground = first[5, 5]
    assert tuple(first[50, 50]) == tuple(second[50, 150]) == color  # the dot of the sure latent
    assert tuple(second[50, 100]) == color and tuple(first[50, 100]) == tuple(ground)  # its way
    assert tuple(first[100, 150]) == tuple(second[100, 150]) == (73, 80, 87)  # the other one stays and has no box
    assert tuple(first[90, 150]) == tuple(ground)


def test_a_narrow_picture_has_room_for_its_captions(tmp_path):
    boxes = jnp.concatenate([BOXES, BOXES])
    movement = follow(Predictions(jnp.zeros((4, 1, 2, 4)), boxes), CLASSES, np.array([[0.9] * 4, [0.1] * 4]))
    save_movement(str(tmp_path / "a.png"), np.zeros((900, 30, 3), np.uint8), movement, 0.5, "Latents in a narrow one")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 14 + 4 * (130 + 14)


def test_the_command(tiny_run, tmp_path, capsys):
    output = tmp_path / "latents.png"
    command = ["visualize", "latents", f"--workdir={tiny_run}", "--example=0", f"--output={output}"]
    assert run(visualize.main, command) == 0, capsys.readouterr().err
    assert "latents in" in capsys.readouterr().out
    with Image.open(output) as sheet:
        assert sheet.width > 200
    assert run(visualize.main, command[:-1]) == 1
    assert "--output is needed" in capsys.readouterr().err

"""Self-attention of the encoder: a point's token is the one there, of the level that was asked for, in every family."""

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.attention_maps import Frame
from deperceiver_jax.visualize.attention_sheet import save_sheet
from deperceiver_jax.visualize.encoder import Place, make_view, parse_points, place_at, self_attention
from tests.drawn_arrays import Patches, abstract_detector
from tests.visualize.test_attention import tiny

CLASSES = ClassMap.from_categories([(1, "round"), (2, "square")])
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
POINTS = [(0.0, 0.0), (0.99, 0.99), (0.5, 0.3)]


def test_a_point_is_of_the_token_there():
    frame = Frame(np.zeros((20, 40, 3), np.uint8), (8, 16))  # 3 x 5 and 2 x 3 cells
    assert [place_at(point, frame, 0).token for point in POINTS] == [0, 14, 2]
    assert [place_at(point, frame, 1).token for point in POINTS] == [0, 5, 1]
    assert parse_points(["10,5", "0,19.5"], (20, 40)) == [(0.25, 0.25), (0.0, 0.975)]
    for text, sentence in (("1", "is not x,y"), ("1,a", "is not x,y"), ("40,3", "image, which has 40 x 20")):
        with pytest.raises(UserError, match=sentence):
            parse_points([text], (20, 40))


def attend(family, random_arrays, layer, level, **model):
    """(record, number of layers, frame, places) of a family behind mean pixels."""
    config = tiny(family)
    config.model.update_from_flattened_dict(model)
    skeleton, params, others = take_apart(abstract_detector(config, Patches))
    loaded = LoadedDetector(skeleton, random_arrays({**params, **others}), config, CLASSES)
    frame = Frame(IMAGE, skeleton.merge(loaded.arrays).token_strides)
    places = [place_at(point, frame, level) for point in POINTS]
    return *self_attention(loaded, frame, places, layer, level), frame, places


@pytest.mark.parametrize("level", [0, 1])
def test_deformable_tokens_look_from_where_they_are(random_arrays, tmp_path, level):
    """Their reference is the centre of the cell that holds the point."""
    record, layers, frame, places = attend("deformable_detr", random_arrays, -1, level)
    assert layers == 1 and record.location.shape[1] == record.weight.shape[1] == len(POINTS)
    rows, columns = frame.level_sizes[level]
    cells = [(int(x * columns), int(y * rows)) for x, y in POINTS]
    centers = (np.array(cells) + 0.5) / (columns, rows)
    np.testing.assert_allclose(record.reference[0].mean(axis=1), centers, atol=1e-6)
    save_sheet(tmp_path / "a.png", [make_view(record, places, IMAGE, frame, level)], 1.5, title="t", note="n")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize("layer, level", [(0, 0), (0, 1), (1, 1)])
def test_smca_attends_within_a_level_or_across(random_arrays, layer, level):
    """The first layer's tokens attend to their own level alone, the second's to all; each row is one attention."""
    layout = {"encoder.layout": ("intra", "multi")}
    record, layers, frame, places = attend("smca", random_arrays, layer, level, **layout)
    lengths = [height * width for height, width in frame.level_sizes]
    assert layers == 2
    assert record.probability.shape[2:] == (len(POINTS), lengths[level] if layer == 0 else sum(lengths))
    np.testing.assert_allclose(record.probability.sum(-1), 1, rtol=1e-5)
    view = make_view(record, places, IMAGE, frame, level)
    assert [panel.caption for line in view.lines for panel in line] == ["point 0", "point 1", "point 2"]
    assert view.lines[0][0].draw((64, 96)).shape == view.large[0].draw((64, 96)).shape == (64, 96, 3)


@pytest.mark.parametrize("family", ["deperceiver", "deperceiver_plus"])
def test_latents_have_no_self_attention_of_places(random_arrays, family):
    with pytest.raises(UserError, match=f"The encoder of this {family} has no self-attention among the places"):
        attend(family, random_arrays, -1, 0)


def draw(*arguments):
    return run(visualize.main, ["visualize", "encoder", *map(str, arguments)])


def test_the_command(tiny_detr, tmp_path, capsys):
    """With points of its own choice; then what can be typed wrongly."""
    output = tmp_path / "encoder.png"
    command = [f"--weights={tiny_detr}", "--example=2", f"--output={output}"]
    assert draw(*command) == 0, capsys.readouterr().err
    assert "points in layer 1 of" in capsys.readouterr().out and output.stat().st_size > 1000
    for wrong, sentence in (
        (["--layer=2"], "--layer: the encoder has the layers 0 to 1, and -1 is the last; not 2."),
        (["--level=1"], "--level: the detector has the levels 0 to 0, not 1."),
        (["--points", "3,4", "3000,4"], "--points: 3000,4 is outside of the image, which has 83 x 61 pixels."),
    ):
        assert draw(*command, *wrong) == 1
        assert sentence in capsys.readouterr().err


def test_attention_of_a_row_is_of_that_row(random_arrays):
    """A token among others is the token by itself."""
    record, _, frame, places = attend("detr", random_arrays, -1, 0)
    config = tiny("detr")
    skeleton, params, others = take_apart(abstract_detector(config, Patches))
    loaded = LoadedDetector(skeleton, random_arrays({**params, **others}), config, CLASSES)
    every = [Place((0.0, 0.0), token) for token in range(frame.level_sizes[0][0] * frame.level_sizes[0][1])]
    whole, _ = self_attention(loaded, frame, every, -1, 0)
    tokens = [place.token for place in places]
    np.testing.assert_allclose(record.probability, whole.probability[:, :, tokens], atol=1e-6)
    assert not np.allclose(whole.probability[:, :, tokens[0]], whole.probability[:, :, tokens[1]], atol=1e-4)

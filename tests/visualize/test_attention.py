"""Pictures of attention: tokens lie where they are in the image, every family is drawn, mistakes get a sentence."""

import numpy as np
import pytest
from PIL import Image

from configs import demo
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.models.layers.recorder import DenseRecord, PointRecord
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.visualize import __main__ as visualize
from deperceiver_jax.visualize.attention import choose_queries, look, make_view
from deperceiver_jax.visualize.attention_maps import (
    COLUMNS,
    Frame,
    dense_view,
    draw_heat,
    draw_points,
    latent_view,
    point_view,
    spread,
)
from deperceiver_jax.visualize.attention_sheet import save_sheet
from deperceiver_jax.visualize.one_image import see
from tests.drawn_arrays import Patches, abstract_detector

CLASSES = ClassMap.from_categories([(1, "round"), (2, "square")])
FRAME = Frame(np.full((32, 48, 3), 90, np.uint8), (8, 16))  # cells: 4 x 6, then 2 x 3


def one_hot(index, length=30):
    return np.eye(length, dtype=np.float32)[index]


def dense(probability, *, bias=None, segments=None):
    """A record of one image; probability [H Q K]."""
    segments = segments or (probability.shape[-1],)
    weight = np.ones((1, probability.shape[1], len(segments)), np.float32)
    return DenseRecord("decoder.layers.0.cross_attention", segments, probability[None], bias, weight)


@pytest.mark.parametrize(
    "token, top, left, cell",
    [(0, 0, 0, 8), (5, 0, 40, 8), (18, 24, 0, 8), (23, 24, 40, 8), (24, 0, 0, 16), (26, 0, 32, 16), (29, 16, 32, 16)],
)
def test_tokens_in_the_corner_are_in_the_corner_of_the_image(token, top, left, cell):
    """Corners of both levels: the highest pixels, and most of the weight, lie in the token's cell."""
    heat = spread(one_hot(token), FRAME, (64, 96))  # twice the size
    inside = heat[2 * top : 2 * (top + cell), 2 * left : 2 * (left + cell)]
    assert inside.max() == heat.max() > 0
    assert inside.sum() > 0.5 * heat.sum()
    picture = draw_heat(FRAME.image, heat)
    brightest = np.unravel_index(picture.sum(axis=-1).argmax(), heat.shape)
    assert 2 * top <= brightest[0] < 2 * (top + cell) and 2 * left <= brightest[1] < 2 * (left + cell)


def test_levels_are_added_as_densities():
    """Tokens that attend alike a pixel, whatever the size of their cells, make a flat map, and its integral is 1."""
    area = np.repeat([64, 256], [24, 6]) / (2 * 32 * 48)
    heat = spread(area, FRAME, (32, 48))
    np.testing.assert_allclose(heat, 1 / (32 * 48), rtol=1e-5)
    np.testing.assert_allclose(spread(np.ones(30), FRAME, (32, 48), by_area=False), 2, rtol=1e-5)


def test_cells_beyond_the_frame_are_cut_off():
    """A frame of 20 x 20 has 2 x 2 cells of stride 16: the last ones begin at pixel 16, and four of theirs are seen."""
    frame = Frame(np.zeros((20, 20, 3), np.uint8), (16,))
    heat = spread(one_hot(3, 4), frame, (200, 200))
    assert heat.argmax() == 200 * 200 - 1 and heat[:80, :80].max() < 0.03 * heat.max()
    with pytest.raises(ValueError, match="have 4 cells, not 5"):
        spread(one_hot(3, 5), frame, (200, 200))


def test_padding_is_cut_off():
    """In a padded frame of 64 x 64 tokens and points lie where they do without the padding."""
    padded = Frame(FRAME.image, FRAME.strides, (64, 64))  # cells: 8 x 8, then 4 x 4
    for token, in_padded in ((8, 10), (24 + 1, 64 + 1)):  # row 1, column 2 of the first level; row 0, column 1
        ours, theirs = spread(one_hot(token), FRAME, (64, 96)), spread(one_hot(in_padded, 80), padded, (64, 96))
        np.testing.assert_allclose(theirs, ours, atol=0.05 * ours.max())  # bicubic at the border
    location = np.random.default_rng(0).uniform(0, 1, (1, 1, 2, 2, 4, 2)).astype(np.float32)
    weight, reference = np.ones(location.shape[:-1], np.float32), np.full((1, 1, 2, 2), 0.5, np.float32)
    share = np.array([[48 / 64, 32 / 64]] * 2, np.float32)  # of both levels' maps, (x, y)
    plain = PointRecord("decoder", location, weight, reference)
    laid = PointRecord("decoder", location * share[:, None], weight, reference * share)
    ours, theirs = (point_view(*given).large[0].draw((64, 96)) for given in ((plain, 0, FRAME), (laid, 0, padded)))
    np.testing.assert_array_equal(theirs, ours)


def test_points_are_those_of_the_query():
    location = np.random.default_rng(0).uniform(0, 1, (1, 2, 2, 2, 4, 2)).astype(np.float32)
    arrays = location, np.ones(location.shape[:-1], np.float32), location.mean(axis=(2, 4))
    both, second = PointRecord("decoder", *arrays), PointRecord("decoder", *(array[:, 1:] for array in arrays))
    drawn, expected, other = (
        point_view(*given, FRAME).large[0].draw((64, 96)) for given in ((both, 1), (second, 0), (both, 0))
    )
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn != other).any()


def test_heads_and_their_gaussians():
    probability = np.stack([one_hot([h, 29]) for h in range(8)])  # of two queries
    bias = np.log(np.maximum(probability[None], 1e-9))
    captions = [[panel.caption for panel in line] for line in dense_view(dense(probability), 0, FRAME).lines]
    assert captions == [[f"head {i}" for i in range(4)], [f"head {i}" for i in range(4, 8)]]
    view = dense_view(dense(probability, bias=bias, segments=(24, 6)), 0, FRAME)
    assert [line[0].caption for line in view.lines] == ["head 0, Gaussian", "head 0", "head 4, Gaussian", "head 4"]
    for gaussian, attention in (view.lines[:2], view.lines[2:]):
        for a, b in zip(gaussian, attention, strict=True):
            # Here they are the same maps, up to the rounding of a level.
            np.testing.assert_allclose(a.draw((32, 48)).astype(int), b.draw((32, 48)).astype(int), atol=1)
    shared = dense_view(dense(probability, bias=bias[:, :1]), 0, FRAME)
    assert [panel.caption for panel in shared.large] == ["Gaussian of all heads", "attention, mean of all heads"]


def test_queries_look_through_latents():
    """A query at latent 2, which reads token 29; and half of it at token 0 itself, where queries look at tokens too."""
    reading = np.stack([one_hot([0, 7, 29]) for _ in range(2)])
    query = np.stack([one_hot([2], 3)] * 2)
    view = latent_view(dense(query), dense(reading), 0, FRAME)
    np.testing.assert_array_equal(
        view.large[0].draw((32, 48)), draw_heat(FRAME.image, spread(one_hot(29), FRAME, (32, 48)))
    )
    assert view.lines[1][0].caption == "latent 2, 100%"
    both = np.concatenate([query / 2, one_hot([[0], [0]]) / 2], axis=-1)
    expected = spread((one_hot(29) + one_hot(0)) / 2, FRAME, (32, 48))
    drawn = latent_view(dense(both), dense(reading), 0, FRAME).large[0].draw((32, 48))
    np.testing.assert_array_equal(drawn, draw_heat(FRAME.image, expected))


def test_the_heaviest_point_is_the_lightest_dot():
    location = np.array([[0.25, 0.25], [0.75, 0.75], [5.0, -3.0]])[None, None]  # the last one far outside
    picture = draw_points(FRAME.image, location, np.array([[[0.7, 0.2, 0.1]]]), np.array([0.25, 0.75]), (320, 480))
    heavy, light, empty = picture[80, 120].sum(), picture[240, 360].sum(), picture[80, 360].sum()
    assert heavy > 600 and heavy > light and light != empty
    assert picture[240, 120, 2] > 200 > picture[240, 120, 0]  # the cross is blue


def test_the_best_queries_or_the_chosen_ones():
    """Queries 1 and 2 are almost at the same place, so the second of them is the last."""
    scores = np.array([[0.1, 0.2], [0.9, 0.3], [0.4, 0.5]])
    boxes = np.array([[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4]], np.float32)
    assert choose_queries(scores, boxes, CLASSES, None, 2) == [(1, 0, 0.9), (0, 1, 0.2)]
    assert choose_queries(scores, boxes, CLASSES, None, 3)[2] == (2, 1, 0.5)
    assert choose_queries(scores, boxes, CLASSES, [2, 1], 2) == [(2, 1, 0.5), (1, 0, 0.9)]


def tiny(family):
    config = demo.get_config(family)
    model = config.model
    model.backbone.update(depth=18, width=8, norm="group_norm")
    model.update(num_classes=2, num_queries=6, embed_dim=32)
    for half in ("encoder", "decoder"):
        if half in model and "num_layers" in model[half]:
            model[half].num_layers = 1
        if half in model and "mlp_dim" in model[half]:
            model[half].mlp_dim = 32
    return config


LATENTS_AS_QUERIES = {
    "relative_boxes": False,
    "encoder.num_latents": 6,
    "encoder.latent_dim": 32,
    "encoder.anchors": False,
}


@pytest.mark.parametrize("family", ["detr", "deformable_detr", "smca", "deperceiver_plus", "deperceiver"])
def test_every_family_is_drawn(family, random_arrays, tmp_path):
    """DePerceiver's latents are its queries here; with a decoder, and through the command, it is below."""
    config = tiny(family)
    if family == "deperceiver":
        config.model.update_from_flattened_dict({**LATENTS_AS_QUERIES, "decoder.num_layers": 0})
    skeleton, params, others = take_apart(abstract_detector(config, Patches))
    loaded = LoadedDetector(skeleton, random_arrays({**params, **others}), config, CLASSES)
    image = np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)
    config.data.update(eval_scale=64, eval_max_size=96)
    frame = see(image, config.data)
    assert frame.shape == (89, 64, 3)
    found = look(loaded, frame)
    strides = () if family == "deformable_detr" else skeleton.merge(loaded.arrays).token_strides
    views = [make_view(found, -1, (q, 0, 0.5), image, Frame(frame, strides), CLASSES.name) for q in (0, 5)]
    save_sheet(tmp_path / "a.png", views, 64 / 89, title=family, note="how to read it")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 500 and sheet.height > 400
    lines = {"smca": 4, "deperceiver_plus": 2}
    assert len(views[0].lines) == (lines[family] if family in lines else 2)
    assert all(len(line) == COLUMNS for line in views[0].lines)


def draw(*arguments):
    return run(visualize.main, ["visualize", "attention", *map(str, arguments)])


def test_the_command(tiny_run, tmp_path, capsys):
    output = tmp_path / "new" / "attention.jpg"
    assert draw(f"--workdir={tiny_run}", "--example=3", "--queries=4,0", f"--output={output}") == 0
    assert f"Wrote {output}: queries 4, 0 of " in capsys.readouterr().out
    with Image.open(output) as sheet:
        assert sheet.format == "JPEG" and sheet.height > 500


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--output is needed"),
        (["--output=a.gif", "--example=0"], "--output: a.gif must end in .png or .jpg."),
        (["--output=a.png"], "Either --image or --example is needed"),
        (["--output=a.png", "--example=0", "--image=b.png"], "Either --image or --example is needed"),
        (["--output=a.png", "--example=10"], "--example: coco_directory, validation, has the images 0 to 9, not 10."),
        (["--output=a.png", "--image=none.png"], "--image: none.png cannot be read: No such file"),
        (["--output=a.png", "--image={0}/config.json"], "{0}/config.json is not an image that can be read"),
        (["--output=a.png", "--example=0", "--queries=1,two"], "--queries: 1,two is not a list of numbers such as"),
        (["--output=a.png", "--example=0", "--queries=5"], "--queries: the detector has the queries 0 to 4, not 5."),
        (["--output=a.png", "--example=0", "--layer=1"], "--layer: the decoder has the layers 0 to 0, and -1 is the"),
        (["--output=a.png", "--example=0", "--best=0"], "--best is 0; it must be at least 1."),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert draw(f"--workdir={tiny_run}", *(argument.format(tiny_run) for argument in arguments)) == 1
    assert capsys.readouterr().err.startswith("error: " + sentence.format(tiny_run))
    assert not list(tmp_path.iterdir())

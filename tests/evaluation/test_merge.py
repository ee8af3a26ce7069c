"""Detections of several views: sahi's answers, the way back of boxes, and what is left out."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data.batches.views import check_views, has_several, plan_views, to_picture
from deperceiver_jax.errors import UserError
from deperceiver_jax.evaluation.merge import merge_views, suppress
from deperceiver_jax.structures import Detections

GOLDEN = Path(__file__).parent.parent / "golden"
SAHI = json.loads((GOLDEN / "merge.json").read_text())


def drawn(seed):
    """record_merge.py's boxes; that file needs sahi, of which only the drawing is taken here."""
    tree = ast.parse((GOLDEN / "record_merge.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    room = {"np": np}
    exec(compile(ast.Module([function], []), "record_merge.py", "exec"), room)
    return room["drawn"](seed)


@pytest.mark.parametrize("case", SAHI)
def test_what_is_left_is_what_sahi_leaves(case):
    seed, iou = case.split()
    rows = drawn(int(seed))
    kept = suppress(rows[:, 4], rows[:, 5].astype(int), rows[:, :4], iou=float(iou))
    assert kept.tolist() == SAHI[case]
    assert 30 < len(kept) < 200


def settings(**fields):
    config = base()
    config.data.update(eval_scale=64, eval_max_size=96)
    config.eval.update_from_flattened_dict(fields)
    return config


def test_views_of_pictures():
    """Whole pictures at every scale, tiles of the large one alone, and all of them mirrored; tiles have one shape."""
    config = settings(**{"flip": True, "scales": (32,), "tiles.size": 100, "tiles.overlap": 0.2})
    views = plan_views(np.array([[250, 180], [90, 70]]), config.data, config.eval)
    assert views.example.tolist() == [0] * 2 * (2 + 3 * 2) + [1] * 2 * 2
    geometry = views.geometry
    assert [size.tolist() for size in geometry.size[:2]] == [[88, 64], [44, 32]]
    assert {tuple(size) for size in geometry.size[2:8].tolist()} == {(64, 64)}
    assert geometry.corner[2:8].tolist() == [[y, x] for y in (0, 75, 150) for x in (0, 80)]
    assert geometry.flip.tolist() == [False] * 8 + [True] * 8 + [False] * 2 + [True] * 2
    assert not has_several(settings().eval) and has_several(config.eval)
    alone = plan_views(np.array([[250, 180]]), config.data, settings().eval)
    assert len(alone.example) == 1 and alone.geometry.size.tolist() == [[88, 64]]


def test_boxes_go_back_to_where_they_were_seen():
    """Of an object at a known place, in every view that sees it whole; those that cut it are told."""
    config = settings(**{"flip": True, "tiles.size": 100, "tiles.overlap": 0.4})
    views = plan_views(np.array([[200, 160]]), config.data, config.eval)
    truth = np.float32([70, 40, 95, 80])
    geometry, width = views.geometry, 160
    seen = np.where(geometry.flip[:, None], np.float32([width - 95, 40, width - 70, 80]), truth)
    corner, extent = geometry.corner[:, [1, 0, 1, 0]], geometry.extent[:, [1, 0, 1, 0]]
    clipped = np.clip(seen - corner, 0, extent)
    whole = (clipped == seen - corner).all(1)
    part = ~whole & (clipped[:, 2:] > clipped[:, :2]).all(1)
    scaled = clipped / extent * geometry.original[:, [1, 0, 1, 0]]
    boxes, cut = to_picture(scaled[:, None].astype(np.float32), geometry)
    np.testing.assert_allclose(boxes[whole, 0], np.tile(truth, (whole.sum(), 1)), atol=1e-3)
    assert whole.sum() >= 4 and part.any() and cut[part].all() and not cut[whole].any()


def test_one_object_of_several_views_is_one_detection():
    config = settings(flip=True)
    views = plan_views(np.array([[100, 100], [100, 50]]), config.data, config.eval)
    box = np.float32([10, 20, 30, 60])
    mirrored = np.float32([66, 20, 86, 60])  # 4 pixels beside it, when it is turned back
    boxes = np.stack([box, mirrored, box, [20, 20, 40, 60]])[:, None].repeat(2, 1)
    detections = Detections(np.float32([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]), np.int32([[1, 2]] * 4), boxes)
    merged = merge_views(views, detections, max_detections=3, iou=0.6)
    np.testing.assert_allclose(merged.scores, np.float32([[0.9, 0.2, -1], [0.7, 0.4, -1]]))
    assert merged.labels[:, :2].tolist() == [[1, 2], [1, 2]]
    moved = 4 * np.float32([[0.8 / 1.7, 0.2 / 0.3], [0, 0]])  # the mean of both, weighted by their scores
    expected = np.tile(box, (2, 2, 1)) + moved[..., None] * np.float32([1, 0, 1, 0])
    np.testing.assert_allclose(merged.boxes[:, :2], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"scales": (0,)}, "config.eval.scales is 0; it must be between 1"),
        ({"scales": ("a",)}, r"config.eval.scales is \('a',\); it is to be short sides in pixels"),
        ({"tiles.size": 3}, "config.eval.tiles.size is 3; it must be between 16"),
        ({"tiles.size": -1}, "config.eval.tiles.size is -1"),
        ({"tiles.overlap": 1.0}, "config.eval.tiles.overlap is 1.0; it must be at least 0 and below 1"),
        ({"merge_iou": 1.5}, "config.eval.merge_iou is 1.5; it must be between 0 and 1"),
    ],
)
def test_settings_that_make_no_views(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        check_views(settings(**fields).eval)

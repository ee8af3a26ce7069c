"""Where a query looked: points of Deformable DETR in a padded frame, and a detector that has no attention."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.app_load import draw
from deperceiver_jax.app.attention import Attention
from deperceiver_jax.errors import UserError
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.prediction.detector import PictureDetector
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.visualize.attention import Look
from tests.drawn_arrays import Patches, abstract_detector, draw_arrays
from tests.visualize.test_attention import CLASSES, tiny


@pytest.fixture(scope="module")
def loaded():
    config = tiny("deformable_detr")
    config.data.update(eval_scale=64, eval_max_size=96)
    config.eval.batch_size = 8
    skeleton, params, others = take_apart(abstract_detector(config, Patches))
    return LoadedDetector(skeleton, draw_arrays({**params, **others}), config, CLASSES)


def test_points_of_a_padded_picture(loaded):
    """Drawn on the picture alone, for the query that the box is of."""
    picture = draw(4)
    found = PictureDetector(loaded).predict(picture, threshold=0)
    attention = Attention(loaded)
    for k in (0, len(found) - 1):
        told = attention(picture, found.boxes[k], int(found.labels[k]), float(found.scores[k]))
        name, score = CLASSES.name(int(found.labels[k])), float(found.scores[k])
        captions = [panel["caption"] for panel in told["panels"][:2]]
        assert captions == [f"query {told['query']}: {name} {score:.2f}", "points of all heads"]
        assert "Dots are what a query reads" in told["note"]
        with Image.open(io.BytesIO(base64.b64decode(told["panels"][1]["src"].partition(",")[2]))) as drawn:
            pixels = np.asarray(drawn.convert("RGB"), int)
        height, width = found.size
        assert abs(pixels.shape[1] / pixels.shape[0] - width / height) < 0.02
        assert pixels[:, -4:].mean() > 25 and pixels[-4:].mean() > 25  # padding would be black
    again = attention(picture, found.boxes[0], int(found.labels[0]), float(found.scores[0]))
    assert again["query"] != told["query"]


def test_a_detector_without_attention(loaded, monkeypatch):
    attention = Attention(loaded)
    monkeypatch.setattr(attention, "look", lambda *_: Look(None, [], []))
    with pytest.raises(UserError, match="deformable_detr has no attention that can be shown."):
        attention(draw(4), np.zeros(4), 0, 0.5)

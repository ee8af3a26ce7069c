"""Where the query of a detection looked: the pictures of `visualize attention`, one by one."""

import base64
import io

import jax
import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from deperceiver_jax.boxes import box_cxcywh_to_xyxy
from deperceiver_jax.errors import UserError
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.prediction.pictures import padded_sizes, prepare, read_pixels
from deperceiver_jax.runs.load_detector import LoadedDetector
from deperceiver_jax.visualize.attention import Look, look_of, make_view, note
from deperceiver_jax.visualize.attention_maps import Frame, Panel
from deperceiver_jax.visualize.fonts import readable

LARGE, SMALL = 480, 240  # long sides of the pictures in pixels


class Attention:
    """Looks again at a picture, in the same frame as for its detections, and compiled once for each."""

    def __init__(self, loaded: LoadedDetector):
        self._config, self._arrays, self._name_of = loaded.config, loaded.arrays, readable(loaded.classes)
        self._classification = build_classification(loaded.config.loss)
        self._sizes = padded_sizes(loaded.config.data)
        self._look = jax.jit(look_of(loaded.skeleton))
        self._strides = loaded.skeleton.merge(loaded.arrays).token_strides

    def look(self, frame: UInt8[np.ndarray, "H W 3"], size: Int32[np.ndarray, "2"]) -> Look:
        """The forward pass over one of the frames, of which `size` is real."""
        return jax.device_get(self._look(self._arrays, frame[None], size[None]))

    def __call__(self, picture: bytes, box: Float[np.ndarray, "4"], label: int, score: float) -> dict:
        """The query that gave a detection: {"query", "note": how to read them, "panels": [{caption, large, src}]}.

        The query is the one whose box, in pixels of the upright picture, and score of the class slot `label` come
        nearest: queries have no number of their own that holds from one run to another. Raises UserError.
        """
        pixels = read_pixels(picture)
        prepared = prepare(pixels, self._config.data, self._sizes)
        found = self.look(prepared.frame, prepared.size)
        if not found.decoder:
            raise UserError(f"{self._config.model.name} has no attention that can be shown.")
        scores = np.asarray(self._classification.scores(found.predictions.logits[-1]))[0, :, label]
        height, width = pixels.shape[:2]
        boxes = np.asarray(box_cxcywh_to_xyxy(found.predictions.boxes[-1, 0]))
        apart = np.abs(boxes - box / [width, height, width, height]).max(axis=1) + np.abs(scores - score)
        query = int(apart.argmin())
        real = prepared.frame[: prepared.size[0], : prepared.size[1]]
        frame = Frame(real, self._strides, prepared.frame.shape[:2])
        view = make_view(found, -1, (query, label, float(scores[query])), pixels, frame, self._name_of)
        panels = [(panel, True) for panel in view.large] + [(panel, False) for line in view.lines for panel in line]
        drawn = [
            {"caption": panel.caption, "large": large, "src": as_address(panel, real.shape, LARGE if large else SMALL)}
            for panel, large in panels
        ]
        return {"query": query, "note": note(found, len(found.decoder) - 1), "panels": drawn}


def as_address(panel: Panel, shape: tuple[int, ...], long_side: int) -> str:
    """The panel as a JPEG in a data: address, in the proportions of `shape`."""
    scale = long_side / max(shape[:2])
    height, width = (max(1, round(side * scale)) for side in shape[:2])
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(panel.draw((height, width)))).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

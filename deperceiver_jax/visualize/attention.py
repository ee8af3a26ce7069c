"""Where a detector looks: the attention of chosen queries over one image, head by head.

    deperceiver visualize attention --workdir=runs/x --image=photo.jpg --output=attention.png
    deperceiver visualize attention --weights=DIR --example=5 --queries=3,17 --layer=0 --output=a.png

A row for each query: its answer; the Gaussian that modulates its attention (SMCA, DePerceiver with anchors); the
attention of each head. DePerceiver's is taken through the latents, of which the strongest are shown by themselves;
Deformable DETR's are the points that it reads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from deperceiver_jax.boxes import box_cxcywh_to_xyxy, box_iou
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.errors import UserError
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.models.layers.recorder import DenseRecord, PointRecord, record_attention
from deperceiver_jax.models.skeleton import Skeleton
from deperceiver_jax.program.command_line import parse_flags
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.structures import Predictions
from deperceiver_jax.visualize.attention_maps import Frame, Panel, View, dense_view, latent_view, point_view
from deperceiver_jax.visualize.attention_sheet import save_sheet
from deperceiver_jax.visualize.draw_boxes import draw_detections
from deperceiver_jax.visualize.flags import attention_flags as define_flags
from deperceiver_jax.visualize.fonts import readable
from deperceiver_jax.visualize.one_image import check_image_flags, read_image, see


class Look(NamedTuple):
    """One forward pass over one image, seen from outside."""

    predictions: Predictions
    decoder: list[DenseRecord] | list[PointRecord]  # what the queries look at, of each layer
    encoder: list[DenseRecord]  # what latents read from the image; empty without latents


def look_of(skeleton: Skeleton) -> Callable[[dict[str, Array], UInt8[Array, "1 H W 3"], Int32[Array, "1 2"]], Look]:
    """(arrays, image, (height, width) of what is not padding) -> Look, to be jitted."""

    def forward(arrays, image, size):
        detector = skeleton.merge(arrays)
        with record_attention(detector, "cross_attention") as records:
            predictions = detector(*normalize_images(image, size))
        of_encoder = [record for record in records if record.name.startswith("encoder.cross_attentions")]
        of_decoder = [record for record in records if record.name.startswith("decoder.")]
        if not of_decoder:  # the latents are the queries, and look themselves
            of_decoder, of_encoder = of_encoder, []
        return Look(predictions, of_decoder, of_encoder)

    return forward


def look(loaded: LoadedDetector, frame: UInt8[np.ndarray, "H W 3"], check=lambda look: None) -> Look:
    """Runs the detector on one image without padding; `check` sees the shapes of the answer before anything is run."""
    forward, size = look_of(loaded.skeleton), np.array([frame.shape[:2]], np.int32)
    check(jax.eval_shape(forward, loaded.arrays, frame[None], size))
    return jax.device_get(jax.jit(forward)(loaded.arrays, frame[None], size))


def choose_queries(
    scores: Float[np.ndarray, "Q C"],
    boxes: Float[np.ndarray, "Q 4"],
    classes: ClassMap,
    chosen: list[int] | None,
    best: int,
) -> list[tuple[int, int, float]]:
    """(query, class slot, score) of the chosen queries, or of the `best` ones by the score of their best class.

    Queries whose box (cxcywh) overlaps that of a better one by more than half come after all others.
    """
    scores = scores[:, list(classes.slots)]
    top = scores.max(axis=1)
    if chosen is None:
        order = np.argsort(-top, kind="stable").tolist()
        apart: list[int] = []
        corners = box_cxcywh_to_xyxy(jnp.asarray(boxes))
        overlap = np.asarray(box_iou(corners[:, None], corners[None]))
        for query in order:
            if not np.any(overlap[query, apart] > 0.5):
                apart.append(query)
        chosen = (apart + [query for query in order if query not in apart])[:best]
    return [(query, classes.slots[scores[query].argmax()], float(top[query])) for query in chosen]


def make_view(
    look: Look, layer: int, answer: tuple[int, int, float], image: UInt8[np.ndarray, "h w 3"], frame: Frame, name_of
) -> View:
    """The row of one query; `answer` is its (query, class slot, score), name_of: class slot -> what to draw."""
    query, label, score = answer
    record = look.decoder[layer]
    if isinstance(record, PointRecord):
        view = point_view(record, query, frame)
    elif look.encoder:
        view = latent_view(record, look.encoder[-1], query, frame)
    else:
        view = dense_view(record, query, frame)
    box = np.asarray(box_cxcywh_to_xyxy(look.predictions.boxes[-1, 0, query]))
    box = box * np.array([image.shape[1], image.shape[0]] * 2)

    def draw(size):
        found = np.array([label]), np.array([score])
        picture = draw_detections(image, box[None], *found, name_of, long_side=max(size))
        return picture[: size[0], : size[1]]

    return View([Panel(f"query {query}: {name_of(label)} {score:.2f}", draw), *view.large], view.lines)


def parse_queries(text: str | None) -> list[int] | None:
    """ "3,17" -> [3, 17]."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--queries: {text} is not a list of numbers such as 3,17.") from None


def main(argv: list[str]) -> None:
    values, config_arguments = parse_flags(argv, define_flags, __doc__)
    check_image_flags(values)
    if values.best < 1:
        raise UserError(f"--best is {values.best}; it must be at least 1.")
    chosen, layer = parse_queries(values.queries), values.layer
    stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
    config, classes = loaded.config, loaded.classes
    image, name = read_image(values, config)

    def check(found: Look) -> None:
        layers, queries = len(found.decoder), found.predictions.logits.shape[2]
        if not -layers <= layer < layers:
            raise UserError(f"--layer: the decoder has the layers 0 to {layers - 1}, and -1 is the last; not {layer}.")
        for query in chosen or []:
            if not 0 <= query < queries:
                raise UserError(f"--queries: the detector has the queries 0 to {queries - 1}, not {query}.")

    keep_compiled(config.train.compilation_cache)
    frame = see(image, config.data)
    found = look(loaded, frame, check)
    scores = np.asarray(build_classification(config.loss).scores(found.predictions.logits[-1]))[0]
    strides = loaded.skeleton.merge(loaded.arrays).token_strides
    answers = choose_queries(scores, found.predictions.boxes[-1, 0], classes, chosen, values.best)
    name_of = readable(classes)
    views = [make_view(found, layer, answer, image, Frame(frame, strides), name_of) for answer in answers]
    title = f"Attention of {config.model.name} in {Path(name).name}"
    number = range(len(found.decoder))[layer]
    save_sheet(values.output, views, frame.shape[1] / frame.shape[0], title=title, note=note(found, number))
    print(f"Wrote {values.output}: queries {', '.join(str(query) for query, _, _ in answers)} of {stored.items}.")


def note(found: Look, layer: int) -> str:
    """How to read the sheet."""
    text = [f"Cross-attention of decoder layer {layer} (of 0 to {len(found.decoder) - 1}); boxes are the last layer's."]
    if isinstance(found.decoder[layer], PointRecord):
        text.append("Dots are what a query reads: the lighter the more it counts, the larger the coarser its level.")
        text.append("The cross is the reference point.")
        return " ".join(text)
    text.append("Each map has a scale of its own: light yellow is where it is highest.")
    if found.encoder:
        which = f", the last of {len(found.encoder)} times" if len(found.encoder) > 1 else ""
        text.append(f"Queries look at latents: maps are what these read from the image (mean of their heads{which}),")
        text.append("weighed by the query's attention; what latents tell one another in between is not in them.")
        text.append("Below, the latents that the query looks at most, each by itself.")
    if any(getattr(record, "bias", None) is not None for record in (found.encoder or found.decoder)):
        text.append("A Gaussian is what modulates the attention; its logarithm is added to the logits.")
    return " ".join(text)

"""Where several runs look for the same object, one below the other: figure 3 of SMCA's paper.

    deperceiver visualize compare_attention runs/fixed runs/single runs/independent --example=5 --output=smca.png
    deperceiver visualize compare_attention runs/a weights/detr_r50 --image=photo.jpg --object=1 --output=a.png

Folders are workdirs or outputs of import-weights, of one data set's classes. The object is one of the example's own,
the largest first, or in an image one of the first run's best answers. Each run shows the query that answers for it: the
one whose box overlaps it best, times its score for the object's class.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from deperceiver_jax.boxes import box_cxcywh_to_xyxy, box_iou
from deperceiver_jax.compare.rows import names_of
from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import require_same_classes
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.program.command_line import parse_flags, split_arguments
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import LoadedDetector, load_for_command
from deperceiver_jax.visualize.attention import Look, choose_queries, look, make_view
from deperceiver_jax.visualize.attention_maps import Frame, Panel, View
from deperceiver_jax.visualize.attention_sheet import save_sheet
from deperceiver_jax.visualize.flags import compare_attention_flags as define_flags
from deperceiver_jax.visualize.fonts import readable
from deperceiver_jax.visualize.one_image import check_image_flags, read_image, see


class Object(NamedTuple):
    """What all runs are asked for."""

    box: Float[np.ndarray, "4"]  # xyxy in [0, 1] of the image
    label: int  # class slot


class Answer(NamedTuple):
    """A run's look at the image."""

    loaded: LoadedDetector
    look: Look
    frame: UInt8[np.ndarray, "H W 3"]
    scores: Float[np.ndarray, "Q C"]


def answer_of(loaded: LoadedDetector, image: UInt8[np.ndarray, "h w 3"], layer: int) -> Answer:
    """Raises UserError for a decoder layer that is not there."""

    def check(found: Look) -> None:
        layers = len(found.decoder)
        if not -layers <= layer < layers:
            raise UserError(f"--layer: the decoder of {loaded.config.model.name} has the layers 0 to {layers - 1}.")

    keep_compiled(loaded.config.train.compilation_cache)
    frame = see(image, loaded.config.data)
    found = look(loaded, frame, check)
    scores = np.asarray(build_classification(loaded.config.loss).scores(found.predictions.logits[-1]))[0]
    return Answer(loaded, found, frame, scores)


def best_query(scores: Float[np.ndarray, "Q C"], boxes: Float[np.ndarray, "Q 4"], wanted: Object) -> int:
    """The query with the best product of overlap and score for the object's class; where none overlaps, of score.

    boxes: cxcywh in [0, 1].
    """
    overlap = np.asarray(box_iou(box_cxcywh_to_xyxy(jnp.asarray(boxes)), jnp.asarray(wanted.box, jnp.float32)[None]))
    score = scores[:, wanted.label]
    return int((score * overlap if overlap.any() else score).argmax())


def own_objects(config_data, example: int) -> list[Object]:
    """An example's targets, the largest first."""
    source = open_source(config_data, config_data.eval_split)
    boxes, labels = source.targets(example)
    height, width = source.sizes[example].tolist()
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    return [Object(boxes[k] / np.array([width, height] * 2), int(labels[k])) for k in order]


def best_objects(first: Answer, count: int) -> list[Object]:
    """What the first run answers with its best queries of different objects."""
    boxes = first.look.predictions.boxes[-1, 0]
    chosen = choose_queries(first.scores, boxes, first.loaded.classes, None, count)
    return [Object(np.asarray(box_cxcywh_to_xyxy(boxes[query])), label) for query, label, _ in chosen]


def view_of(answer: Answer, wanted: Object, image: UInt8[np.ndarray, "h w 3"], layer: int, name: str, name_of) -> View:
    """A run's row: its answer for the object, under its name, and where the query looks."""
    loaded, found = answer.loaded, answer.look
    query = best_query(answer.scores, found.predictions.boxes[-1, 0], wanted)
    strides = loaded.skeleton.merge(loaded.arrays).token_strides
    told = query, wanted.label, float(answer.scores[query, wanted.label])
    view = make_view(found, layer, told, image, Frame(answer.frame, strides), name_of)
    return view._replace(large=[Panel(f"{name}: {view.large[0].caption}", view.large[0].draw), *view.large[1:]])


def main(argv: list[str]) -> None:
    places, others = split_arguments(argv[1:], define_flags)
    folders = [as_path(place) for place in places]
    values, rest = parse_flags([argv[0], *others], define_flags, __doc__)
    if rest[1:]:
        raise UserError(f"{rest[1]}: runs that are compared take no config; each has its own.")
    check_image_flags(values)
    if len(folders) < 2:
        raise UserError("Runs are missing: name two workdirs or more, as in runs/a runs/b.")
    names = names_of(folders)
    runs = [load_for_command(str(folder), None, "latest", argv[:1])[1] for folder in folders]
    first = runs[0]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        require_same_classes(first.classes, str(folders[0]), run.classes, str(folder))
    image, picture = read_image(values, first.config)
    answers = [answer_of(run, image, values.layer) for run in runs]
    if values.example is None:
        wanted = best_objects(answers[0], values.object + 1)
    else:
        wanted = own_objects(first.config.data, values.example)
    if not 0 <= values.object < len(wanted):
        raise UserError(f"--object: the picture has {len(wanted)} objects, counted from 0; not {values.object}.")
    chosen, name_of = wanted[values.object], readable(first.classes)
    views = [
        view_of(answer, chosen, image, values.layer, name, name_of) for answer, name in zip(answers, names, strict=True)
    ]
    title = f"Where {len(runs)} runs look for a {name_of(chosen.label)} in {Path(picture).name}"
    note = "Each run's query that answers for it, and its cross-attention in "
    note += "the last decoder layer" if values.layer == -1 else f"decoder layer {values.layer}"
    note += "; each map has a scale of its own. A Gaussian is what modulates the attention."
    save_sheet(values.output, views, image.shape[1] / image.shape[0], title=title, note=note)
    print(f"Wrote {values.output}: {', '.join(names)}.")

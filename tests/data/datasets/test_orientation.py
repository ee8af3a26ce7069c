"""Pictures with an EXIF orientation: boxes and pixels are in one frame, in training, evaluation and prediction."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deperceiver_jax.data.batches.loader import EvaluationBatches, TrainBatches
from deperceiver_jax.data.batches.pixels import decode_image
from deperceiver_jax.data.datasets.source import open_source
from deperceiver_jax.errors import UserError
from deperceiver_jax.prediction.pictures import padded_sizes, prepare, read_pixels

# What a camera does, the inverse of what a viewer does, by orientation.
AS_STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
BOX = [10, 6, 30, 14]  # xywh in the upright picture of 60 x 40 (width x height)
SIZES = dict(num_workers=0, batch_size=1, buckets=1, eval_buckets=1, scales=(40,), max_size=60, crop_probability=0.0)
SIZES |= dict(eval_scale=40, eval_max_size=60)


def picture(orientation, format, size=(40, 60)):
    """A white box on black, stored as `orientation` says, and the tag that says so."""
    upright = np.zeros((*size, 3), np.uint8)
    x, y, w, h = BOX
    upright[y : y + h, x : x + w] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(AS_STORED[orientation](upright))).save(file, format, exif=exif)
    return file.getvalue()


def write(coco_folder, images, stated):
    """Images by id from 1, all annotated with BOX; stated: their annotated (height, width)."""

    def change(content):
        for image, size in zip(content["images"], stated, strict=True):
            image.update(dict(zip(("height", "width"), size, strict=True)) if size else {"height": None})

    boxes = [coco_folder.annotation(id, id, BOX) for id in range(1, len(images) + 1)]
    files = {f"{id}.jpg": image for id, image in enumerate(images, 1)}
    sizes = dict.fromkeys(range(1, len(images) + 1), (40, 60))
    coco_folder.write(boxes, sizes=sizes, images=files, change=change)


def bright_box(image):
    rows, columns = np.nonzero(image[..., 1] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_lie_on_their_objects_in_all_orientations(coco_folder, tmp_path, format, flip):
    """Within half a pixel, at the pictures' own scale: training with and without a flip, evaluation and prediction."""
    images = [picture(orientation, format) for orientation in range(1, 9)]
    write(coco_folder, images, [(40, 60)] * 8)
    source = open_source(coco_folder.config(**SIZES, flip_probability=flip), "train")
    np.testing.assert_array_equal(source.sizes, [[40, 60]] * 8)
    config = coco_folder.config(**SIZES, flip_probability=flip)
    files = [tmp_path / f"{k}.{format.lower()}" for k in range(8)]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    stream = iter(TrainBatches(source, config, seed=0))
    trained = [next(stream) for _ in range(8)]
    stream.close()
    seen = trained + list(EvaluationBatches(source, config, batch_size=1))
    assert len(seen) == 16
    for number, batch in enumerate(seen):
        assert tuple(batch.size[0]) == tuple(batch.original_size[0]) == (40, 60)
        expected = np.float32([10, 6, 40, 20])
        if number < 8 and flip:
            expected = np.float32([20, 6, 50, 20])
        x, y, w, h = batch.boxes[0, 0] * [60, 40, 60, 40]
        np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], expected, atol=1e-4)
        assert np.abs(bright_box(batch.image[0]) - expected).max() <= 0.5
    for file in files:
        prepared = prepare(read_pixels(file), config, padded_sizes(config))
        assert tuple(prepared.size) == tuple(prepared.original_size) == (40, 60)
        assert np.abs(bright_box(prepared.frame) - [10, 6, 40, 20]).max() <= 0.5
    for position in range(8):
        image = decode_image(source.image_bytes(position), source.orientation(position))
        np.testing.assert_array_equal(bright_box(image), [10, 6, 40, 20])


@pytest.mark.parametrize(
    "choice, turned",
    [("annotated", [6, 1, 6, 6, 3, 8]), ("apply", [6, 6, 6, 6, 3, 8]), ("ignore", [1, 1, 1, 1, 1, 1])],
)
def test_the_annotated_size_decides_or_the_field_does(coco_folder, caplog, choice, turned):
    """Its size fits the upright picture, the stored one, neither, is not there, fits both (half turn, square)."""
    images = [picture(6, "JPEG")] * 4 + [picture(3, "JPEG"), picture(8, "JPEG", (50, 50))]
    write(coco_folder, images, [(40, 60), (60, 40), (70, 70), None, (40, 60), (50, 50)])
    source = open_source(coco_folder.config(exif_orientation=choice), "train")
    assert [source.orientation(k) for k in range(6)] == turned
    sizes = [(40, 60) if orientation == 6 else (60, 40) for orientation in turned[:4]] + [(40, 60), (50, 50)]
    np.testing.assert_array_equal(source.sizes, sizes)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "1 images have another size than annotated (the first is 3.jpg)" in warnings[0]
    counted = "4 images have an EXIF orientation of which their annotated size does not tell"
    assert (counted in warnings[0]) == (choice == "annotated")
    assert ("(the first is 3.jpg; config.data.exif_orientation=apply or ignore decides it)" in warnings[0]) == (
        choice == "annotated"
    )


def test_another_choice_is_refused(coco_folder):
    coco_folder.write()
    with pytest.raises(
        UserError, match="config.data.exif_orientation is 'maybe'; it can be annotated, apply or ignore"
    ):
        open_source(coco_folder.config(exif_orientation="maybe"), "train")


def test_a_picture_is_drawn_upright(coco_folder, tmp_path):
    """By its place in a split, where the annotated size decides, and as a file, as viewers do."""
    from configs.base import base
    from deperceiver_jax.visualize.detections import compare
    from deperceiver_jax.visualize.one_image import read_image

    write(coco_folder, [picture(6, "JPEG")], [(40, 60)])
    config = base()
    config.data, config.data.eval_split = coco_folder.config(), "train"
    (tmp_path / "a.jpg").write_bytes(picture(6, "JPEG"))
    for place in ({"example": 0, "image": None}, {"example": None, "image": str(tmp_path / "a.jpg")}):
        np.testing.assert_array_equal(bright_box(read_image(SimpleNamespace(**place), config)[0]), [10, 6, 40, 20])
    row = compare(open_source(coco_folder.config(), "train"), [], [0], 0.5)[0]
    np.testing.assert_array_equal(row.true_boxes[0], [10, 6, 40, 20])
    np.testing.assert_array_equal(bright_box(row.image), [10, 6, 40, 20])

"""load and predict: what may be a picture, what comes back, how much is compiled, and what is refused."""

import itertools
import threading
import zlib

import cv2
import jax
import numpy as np
import pytest
import supervision
from PIL import Image

from deperceiver_jax import UserError, load, load_detector
from deperceiver_jax.data.batches.geometry import evaluation_geometry
from deperceiver_jax.data.batches.pixels import place_image
from deperceiver_jax.images import normalize_images
from deperceiver_jax.losses.classification import build_classification
from deperceiver_jax.prediction.pictures import read_pixels

SIZES = [(60, 90), (700, 500), (33, 20), (64, 64), (1, 1), (3, 2000), (2000, 3), (96, 160), (161, 96), (50, 200)]


@pytest.fixture(scope="module")
def detector(tiny_run):
    return load(tiny_run)


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]


def same(found, other):
    return all(np.array_equal(getattr(found, name), getattr(other, name)) for name in ("boxes", "scores", "labels"))


def test_answers_are_the_detectors_own(tiny_run, detector, pictures):
    """Beside load_detector's model on the scaled picture in its frame, its best class a query by hand."""
    model, config, classes = load_detector(tiny_run)
    geometry = evaluation_geometry(np.int32([pictures[0].shape[:2]]), config.data)
    assert geometry.size[0].tolist() == [96, 144]
    frame = np.zeros((96, 160, 3), np.uint8)
    place_image(frame, pictures[0], False, geometry.window()[0], geometry.size[0])
    predictions = jax.jit(lambda *images: model(*normalize_images(*images)))(frame[None], geometry.size)
    scores = np.asarray(build_classification(config.loss).scores(predictions.logits[-1]))[0]
    centre, extent = np.split(np.asarray(predictions.boxes[-1, 0]), 2, axis=1)
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1) * [90, 60, 90, 60]

    found = detector.predict(pictures[0], threshold=0)
    assert found.size == (60, 90) and len(found) == 5
    mine, theirs = np.argsort(found.boxes[:, 3]), np.argsort(boxes[:, 3])  # scores near 1 have no order of their own
    np.testing.assert_allclose(found.scores[mine], scores.max(-1)[theirs], rtol=1e-4)
    np.testing.assert_allclose(found.boxes[mine], boxes[theirs], atol=0.02)
    assert (np.diff(found.scores) <= 0).all()
    assert found.names[mine].tolist() == [classes.name(label) for label in scores.argmax(-1)[theirs]]
    assert found.category_ids.tolist() == [{"white": 20, "green": 30}[name] for name in found.names]
    assert [x.dtype for x in (found.boxes, found.scores, found.labels)] == [np.float32, np.float32, np.int64]


def test_every_kind_of_picture_gives_the_same_bits(detector, pictures, tmp_path):
    Image.fromarray(pictures[0]).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        array = np.array(opened)
        path = tmp_path / "a.jpg"
        found = detector.predict([path, str(path), path.read_bytes(), opened, array], threshold=0)
    assert same(detector.predict(path.read_bytes(), threshold=0), detector.predict(path, threshold=0))
    assert all(same(found[0], other) for other in found)
    grey = pictures[0][..., 0]
    repeated = np.repeat(grey[..., None], 3, axis=2)
    assert same(*detector.predict([grey, repeated], threshold=0))
    assert same(*detector.predict([Image.fromarray(grey), repeated], threshold=0))
    assert same(detector.predict(np.stack([array, array]), threshold=0)[1], found[0])  # an array of pictures


def test_a_phones_picture_is_turned(detector, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures[0]).save(tmp_path / "a.png", exif=exif)
    turned = np.ascontiguousarray(np.rot90(pictures[0], -1))
    with Image.open(tmp_path / "a.png") as opened:
        found = detector.predict([tmp_path / "a.png", opened, turned], threshold=0)
    assert found[0].size == (90, 60) and same(found[0], found[2]) and same(found[1], found[2])


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_is_none_turns_nothing(pictures, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pictures[0]).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert read_pixels(opened).shape == read_pixels(tmp_path / "a.jpg").shape == pictures[0].shape


def test_pillow_and_files_are_turned_by_exif_alone(pictures, tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    xmp += b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    Image.fromarray(pictures[0]).save(tmp_path / "a.jpg", xmp=xmp)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert read_pixels(opened).shape == read_pixels(tmp_path / "a.jpg").shape == pictures[0].shape


def test_a_handful_of_compiled_shapes_however_many_sizes_come(detector, pictures):
    """All sizes are found in, in order, alone as well as together."""
    found = detector.predict(pictures * 3, threshold=0)
    assert [x.size for x in found] == SIZES * 3
    assert all(len(x) == 5 and np.isfinite(x.boxes).all() for x in found)
    for picture, expected in zip(pictures, found, strict=False):
        np.testing.assert_allclose(detector.predict(picture, threshold=0).scores, expected.scores, rtol=1e-4)
    assert detector.padded_sizes.tolist() == [[96, 96], [96, 128], [128, 96], [96, 160], [160, 96]]
    assert detector._step._cache_size() <= 2 * len(detector.padded_sizes)


def test_threshold_and_number(detector, pictures):
    every = detector.predict(pictures[0], threshold=0)
    threshold = float(every.scores[2])
    assert same(detector.predict(pictures[0], threshold=threshold), every.take(every.scores >= threshold))
    assert same(detector.predict(pictures[0], threshold=0, max_detections=2), every.take(slice(2)))


def test_fields_of_the_config_can_be_changed(tiny_run, pictures):
    changed = load(tiny_run, checkpoint="best", config={"eval.max_detections": 2})
    assert len(changed.predict(pictures[0], threshold=0)) == 2
    with pytest.raises(UserError, match="no field eval.max_detection; the nearest is"):
        load(tiny_run, config={"eval.max_detection": 2})


def test_a_mirrored_picture_has_mirrored_boxes(tiny_run, pictures):
    """With config.eval.flip; tiles and scales find in, too, and what is compiled does not grow with the pictures."""
    fields = {"eval.flip": True, "eval.scales": "(64,)", "eval.tiles.size": 300, "eval.batch_size": 8}
    detector = load(tiny_run, config=fields)
    large = pictures[1]
    mirrored = np.ascontiguousarray(large[:, ::-1])
    found, other = detector.predict([large, mirrored], threshold=0)
    assert len(found) > 5  # of the whole picture alone
    np.testing.assert_allclose(np.sort(found.scores), np.sort(other.scores), rtol=1e-3, atol=1e-5)
    left = large.shape[1] - other.boxes[:, 2]
    np.testing.assert_allclose(np.sort(found.boxes[:, 0]), np.sort(left), atol=0.5)
    compiled = detector._step._cache_size()
    detector.predict([np.concatenate([large, large])], threshold=0)
    assert detector._step._cache_size() <= compiled + 2 <= 2 * len(detector.padded_sizes)


def test_several_threads_get_what_one_gets(detector, pictures):
    expected, found = detector.predict(pictures, threshold=0), {}

    def work(thread):
        found[thread] = detector.predict(pictures, threshold=0)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(*pair) for each in found.values() for pair in zip(each, expected, strict=True))


def test_a_stream_is_in_order_and_holds_a_few_batches(detector, pictures):
    """Also where one picture waits for others of its size: after some batches it goes on without them."""
    taken = []
    portrait, landscape = pictures[1], pictures[0]
    size, count = 8, 300

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield portrait if number == 0 else landscape

    most = 0
    for number, found in enumerate(itertools.islice(detector.stream(endless(), batch_size=size), count)):
        assert found.size == (SIZES[1] if number == 0 else SIZES[0])
        most = max(most, len(taken) - number)
    assert most < 150


def test_supervision_takes_them(detector, pictures):
    found = detector.predict(pictures[0], threshold=0)
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections) and len(theirs) == 5
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    np.testing.assert_array_equal(theirs.confidence, found.scores)
    np.testing.assert_array_equal(theirs.class_id, found.labels)
    assert theirs["class_name"].tolist() == found.names.tolist()
    assert len(theirs[theirs.class_id == found.labels[0]]) == (found.labels == found.labels[0]).sum()
    drawn = supervision.BoxAnnotator().annotate(pictures[0].copy(), theirs)
    drawn = supervision.LabelAnnotator().annotate(drawn, theirs)
    assert drawn.shape == pictures[0].shape and (drawn != pictures[0]).any()
    assert len(found.take(slice(0)).to_supervision()) == 0


@pytest.mark.parametrize(
    "given, how, sentence",
    [
        ([], {}, "There are no pictures to look at."),
        ("{0}/none.jpg", {}, "{0}/none.jpg cannot be read: No such file or directory."),
        (["{0}/a.png", "{0}"], {}, "Picture 1: {0} cannot be read: Is a directory."),
        ("{0}/half.png", {}, "{0}/half.png is not a whole image: it is a truncated PNG."),
        ("{0}/vast.png", {}, "{0}/vast.png is not a whole image: its pixels are more than"),
        (np.zeros((4, 4, 3)), {}, "A picture's array is uint8, [height, width, 3] in RGB or [height, width] in grey"),
        (np.zeros((4, 4, 4), np.uint8), {}, "A picture's array is uint8"),
        (np.zeros((0, 4, 3), np.uint8), {}, "A picture's array is uint8"),
        ([3], {}, "A picture is a path, the bytes of a file, a PIL image or a uint8 array, not int."),
        ("{0}/a.png", {"threshold": 2}, "threshold is 2; it must be between 0 and 1."),
        ("{0}/a.png", {"max_detections": 101}, "max_detections is 101; it must be between 1 and 100."),
        ("{0}/a.png", {"batch_size": 0}, "batch_size is 0; it must be at least 1."),
    ],
)
def test_mistakes_are_one_sentence(detector, pictures, tmp_path, given, how, sentence):
    whole = cv2.imencode(".png", pictures[0])[1].tobytes()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    side = (20_000).to_bytes(4)
    header = whole[12:16] + side + side + whole[24:29]
    (tmp_path / "vast.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:])
    place = [x.format(tmp_path) if isinstance(x, str) else x for x in given] if isinstance(given, list) else given
    with pytest.raises(UserError) as error:
        detector.predict(place.format(tmp_path) if isinstance(place, str) else place, **how)
    assert str(error.value).startswith(sentence.format(tmp_path))

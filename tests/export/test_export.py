"""export as a person runs it: every family as ONNX and as StableHLO, and files that are not written."""

import json
import re
import zipfile
from pathlib import Path

import cv2
import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from configs import deformable_detr, deperceiver, deperceiver_plus, detr, smca
from deperceiver_jax.data import open_source
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.export import __main__ as program
from deperceiver_jax.export import export_detector as steps
from deperceiver_jax.export.stablehlo_file import METADATA, PROGRAM, open_stablehlo
from deperceiver_jax.images import normalize_images
from deperceiver_jax.models import abstract_detector
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.load_detector import load_detector
from deperceiver_jax.runs.stored_detector import save_params
from deperceiver_jax.runs.workdir import config_text, read_classes, read_config
from tests.drawn_arrays import Patches

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {
    "detr": detr,
    "deformable_detr": deformable_detr,
    "smca": smca,
    "deperceiver": deperceiver,
    "deperceiver_plus": deperceiver_plus,
}
HALVES = {"encoder.num_layers": 1, "encoder.mlp_dim": 8, "decoder.num_layers": 2, "decoder.mlp_dim": 8}
SMALL = {
    "detr": {**HALVES, "encoder.num_heads": 2, "decoder.num_heads": 2},
    "deformable_detr": {**HALVES, "encoder.num_heads": 2, "decoder.num_heads": 2},
    "smca": {"encoder.mlp_dim": 8, "decoder.num_layers": 2, "decoder.mlp_dim": 8},
    "deperceiver": {"encoder.num_latents": 6, "encoder.latent_dim": 32, "encoder.num_blocks": 2},
    "deperceiver_plus": {"decoder.num_layers": 2, "decoder.num_heads": 2, "decoder.mlp_dim": 8, "neck_blocks": 1},
}
ONE_LAYER = {"encoder.layout": ("multi",)}
# A ResNet of one stride, a dilated and deformable one, and one of several strides; mean pixels stand in for the others.
WITH_RESNET = {("detr", "r50"), ("deformable_detr", "r50_single_scale_dc5"), ("deperceiver_plus", "r50_multiscale")}


@pytest.fixture
def trained(tmp_path, tmp_path_factory, rectangles, random_arrays):
    """Writes a directory of a small variant's random weights, for the classes of `rectangles` -> its path."""

    def make(family, variant, changes=()):
        config = FILES[family].get_config(variant)
        config.data.update(rectangles)
        config.data.eval_buckets = 1
        config.train.compilation_cache = str(tmp_path_factory.getbasetemp() / "compiled_exports")
        classes = open_source(config.data, "validation").classes
        fields = {"embed_dim": 32, "num_queries": 7, "num_classes": classes.num_slots, **SMALL[family], **dict(changes)}
        config.model.update_from_flattened_dict(fields)
        config.model.backbone.update(width=4)
        if config.model.backbone.depth == 50 and not config.model.backbone.dilation:
            config.model.backbone.depth = 18
        _, params, others = take_apart(abstract_detector(config))
        save_params(tmp_path / "trained", random_arrays({**params, **others}), config_text(config), classes.to_json())
        return tmp_path / "trained"

    return make


def export(*arguments) -> int:
    return run(program.main, ["export", *map(str, arguments)])


def pictures(batch, height, width):
    """(image, size, original size) of a batch whose first picture does not fill its frame."""
    image = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
    size = np.tile(np.int32([height, width]), (batch, 1))
    size[0] = height - 9, width - 20
    return image, size, size * 3


def answers_of(detector):
    return jax.jit(lambda image, size: detector(*normalize_images(image, size)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "changes", "size"),
    [
        ("detr", "r50", {}, "dynamic"),
        ("deformable_detr", "r50_single_scale_dc5", {"backbone.groups": 2, "backbone.deformable_stages": 1}, "64x96"),
        ("deformable_detr", "r50_two_stage", {"neck": "bifpn", "neck_layers": 1}, "dynamic"),
        ("smca", "r50_single_scale", ONE_LAYER, "64x96"),
        ("smca", "r50_multiscale", {"encoder.layout": ("intra", "multi")}, "64x96"),
        ("smca", "r50_multiscale_conv", {"encoder.num_layers": 1}, "dynamic"),
        ("deperceiver", "r50_multiscale", {}, "dynamic"),
        ("deperceiver_plus", "r50_multiscale", {}, "dynamic"),
    ],
)
def test_every_family_as_onnx(tmp_path, trained, capsys, monkeypatch, family, variant, changes, size):
    if (family, variant) not in WITH_RESNET:
        monkeypatch.setattr("deperceiver_jax.models.detector.ResNet", Patches)
    weights, file = trained(family, variant, changes), tmp_path / "x.onnx"
    arguments = [f"--weights={weights}", f"--output={file}", f"--size={size}", "--batch=dynamic", "--check_images=3"]
    assert export(*arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "on drawn pictures:" in printed and "on the split validation: 3 pictures" in printed
    assert f"Wrote {file}:" in printed and [path.name for path in tmp_path.glob("*x.onnx*")] == ["x.onnx"]

    config, classes = read_config(weights / "config.json"), read_classes(weights / "classes.json")
    stored = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert ClassMap.from_json(stored["classes"]) == classes and classes.names == ("white", "green")
    (tmp_path / "config.json").write_text(stored["config"])
    assert read_config(tmp_path / "config.json").model == config.model and stored["detector"] == family


@pytest.mark.slow
def test_stablehlo(tmp_path, trained, capsys):
    weights, file = trained("detr", "r50"), tmp_path / "x.stablehlo"
    arguments = [f"--weights={weights}", f"--output={file}", "--format=stablehlo", "--batch=2", "--check_images=0"]
    assert export(*arguments) == 0, capsys.readouterr().err
    detector, _, classes = load_detector(weights)
    inputs = pictures(2, 64, 96)
    expected = answers_of(detector)(*inputs[:2])
    np.testing.assert_allclose(open_stablehlo(file)(*inputs).query_logits, expected.logits[-1], atol=1e-4)
    with zipfile.ZipFile(file) as archive:
        assert ClassMap.from_json(json.loads(archive.read(METADATA))["classes"]) == classes
        exported = jax.export.deserialize(bytearray(archive.read(PROGRAM)))
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.slow
def test_stablehlo_in_bfloat16(tmp_path, trained, capsys):
    weights, file = trained("detr", "r50"), tmp_path / "x.stablehlo"
    arguments = [f"--weights={weights}", f"--output={file}", "--format=stablehlo", "--size=64x96", "--check_images=2"]
    assert export(*arguments, "--precision=bfloat16") == 0, capsys.readouterr().err
    with zipfile.ZipFile(file) as archive:
        exported = jax.export.deserialize(bytearray(archive.read(PROGRAM)))
    assert "xbf16>" in exported.mlir_module() and "stablehlo.convolution" in exported.mlir_module()


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(tmp_path, trained, capsys, monkeypatch):
    weights = trained("detr", "r50")
    write, read = steps.writer_and_reader("onnx")

    def run_otherwise(*inputs):
        found = read(tmp_path / ".x.onnx.partial")(*inputs)
        found.query_boxes[0, 3, 1] += 1e-3
        return found

    monkeypatch.setattr(steps, "writer_and_reader", lambda _: (write, lambda path: run_otherwise))
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"--weights={weights}", f"--output={tmp_path}/x.onnx", "--size=64x96", "--check_images=0"]
    assert export(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sorted(tmp_path.rglob("*")) == before
    assert "x.onnx is not written: at drawn picture 0 (64 x 96 in a frame of 64 x 96), query 3, cy is " in error


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "found", "written"), [("float32", 0.4998, False), ("float16", 0.498, True)])
def test_a_file_with_another_ap_is_not_written(tmp_path, trained, capsys, monkeypatch, precision, found, written):
    weights = trained("detr", "r50")
    precisions = iter([0.5, found])
    monkeypatch.setattr(steps, "average_precision", lambda *_: next(precisions))
    arguments = [f"--weights={weights}", f"--output={tmp_path}/x.onnx", "--size=64x96", "--check_images=2"]
    assert export(*arguments, f"--precision={precision}") == (0 if written else 1)
    assert (tmp_path / "x.onnx").exists() == written
    printed = capsys.readouterr()
    if written:
        assert "AP 0.49800, and 0.50000 by JAX" in printed.out
        arrays = onnx.load(tmp_path / "x.onnx").graph.initializer
        kernels = {i.data_type for i in arrays if len(i.dims) == 4 and min(i.dims) > 1}
        assert kernels == {onnx.TensorProto.FLOAT16}
    else:
        assert "its AP on 2 pictures of validation is 0.49980, and JAX's 0.50000" in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--output is needed"),
        (["--output={}/x.onnx", "--score_threshold=nan"], "--score_threshold is nan; it must be between 0 and 1."),
        (["--output={}/x.pb"], "x.pb is to end in .onnx, as --format=onnx is asked for"),
        (["--output={}/x.onnx", "--format=stablehlo"], "x.onnx is to end in .stablehlo"),
        (["--output={}/here.onnx"], "here.onnx exists already"),
        (["--output={}/deep/x.onnx"], "there is no folder"),
        (["--output={}/x.onnx", "--precision=float16", "--check_images=0"], "compared by its AP alone"),
        (["--output={}/x.onnx", "--precision=bfloat16"], "take float16, or --format=stablehlo."),
        (["--output={}/x.onnx", "--batch=0"], "--batch is '0'"),
        (["--output={}/x.onnx", "--size=64"], "--size is '64'; it can be HEIGHTxWIDTH"),
        (["--output={}/x.onnx", "--format=tflite"], "--format=tflite"),
        (["--output={}/x.onnx", "--config.data.directory=/nowhere"], "--check_images=0 exports without"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tiny_run, capsys, arguments, sentence):
    (tmp_path / "here.onnx").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert export(f"--workdir={tiny_run}", *(argument.format(tmp_path) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert sorted(tmp_path.rglob("*")) == before


def test_learned_positions_have_no_free_size(tmp_path, trained, capsys):
    weights = trained("detr", "r50", {"position.encoding": "learned"})
    assert export(f"--weights={weights}", f"--output={tmp_path}/x.onnx", "--check_images=0") == 1
    assert "a file for frames of any size cannot have it; give --size=HEIGHTxWIDTH" in capsys.readouterr().err


def test_onnx_without_its_packages(tmp_path, tiny_run, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert export(f"--workdir={tiny_run}", f"--output={tmp_path}/x.onnx") == 1
    assert "--format=onnx needs onnxruntime: pip install '.[onnx]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_file_alone(tmp_path, trained, monkeypatch):
    """What docs/export.md says: other numbers of pictures, boxes in pixels of the originals, best score first."""
    monkeypatch.setattr("deperceiver_jax.models.detector.ResNet", Patches)
    weights = trained("deperceiver", "r50_16")
    file = tmp_path / "x.onnx"
    assert export(f"--weights={weights}", f"--output={file}", "--batch=dynamic", "--check_images=0") == 0
    detect = answers_of(load_detector(weights)[0])
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.random.default_rng(0).integers(0, 256, (70, 110, 3), np.uint8))
    (code,) = (body for body in PYTHON.findall(PAGE.read_text()) if "onnxruntime" in body)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("demo.onnx", "x.onnx").replace("score > 0.5", "score > 0.0"), names)
    assert names["image"].shape == (1, 96, 160, 3) and (names["height"], names["width"]) == (96, 151)
    assert len(names["found"]) == 7 and {name for name, _, _ in names["found"]} <= {"white", "green"}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "size", "original_size"]
    assert session.get_inputs()[0].shape == ["batch", "32*h", "32*w", 3]
    for batch, height, width in ((1, 96, 64), (3, 64, 160)):
        image, size, original = pictures(batch, height, width)
        found = session.run(
            ["boxes", "scores", "labels", "query_logits"], {"image": image, "size": size, "original_size": original}
        )
        boxes, scores, labels, logits = found
        np.testing.assert_allclose(logits, detect(image, size).logits[-1], atol=1e-4)
        assert boxes.shape == (batch, 7, 4) and scores.shape == labels.shape == (batch, 7)
        assert (np.diff(scores, axis=1) <= 0).all() and boxes.min() > -original.max() and boxes.max() > 1

"""Weights by name, from a hub on this machine: what is fetched, what is read of it, and what a person is told."""

import json
import os
import subprocess
import sys

import cv2
import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest
import safetensors.numpy

from configs import deformable_detr, detr
from deperceiver_jax import UserError, load, load_detector
from deperceiver_jax import eval as eval_program
from deperceiver_jax import import_weights as import_program
from deperceiver_jax import predict as predict_program
from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.models.skeleton import take_apart
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.published_detector import published_classes, published_config
from deperceiver_jax.runs.stored_detector import find_detector, load_params
from deperceiver_jax.weights import hub as names
from deperceiver_jax.weights.backbone import load_backbone
from deperceiver_jax.weights.name_rules import NameRules, torch_shapes
from deperceiver_jax.weights.tables import LAYOUTS
from deperceiver_jax.weights.tables.parts import resnet_rules
from tests.drawn_arrays import abstract_detector
from tests.hub_on_loopback import Hub, commit
from tests.seeded import seeded_state_dict
from tests.shared_work import abstract_detectors_are_shared  # noqa: F401
from tests.torch_state import to_torch_state

COCO_LABELS = {str(slot): COCO_CATEGORIES.get(slot, "N/A") for slot in range(91)}
DETR = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "id2label": COCO_LABELS}
DEFORMABLE = DETR | {"model_type": "deformable_detr", "architectures": ["DeformableDetrForObjectDetection"]}
TIMM = {"backbone": "resnet50", "use_timm_backbone": True, "backbone_config": None}
NARROW = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
    },
    "d_model": 32,
    "num_queries": 7,
    "two_stage_num_proposals": 7,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 8 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
SCALING = {"size": {"shortest_edge": 96, "longest_edge": 160}}


def folder_of(path, config, **files):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def seeded_files(folder) -> dict[str, bytes]:
    """What the folder of a small detector is to hold, with seeded weights under the names of transformers."""
    config = published_config(folder)
    rules = LAYOUTS["hugging_face_resnet"][config.model.name](config.model)
    state = seeded_state_dict(torch_shapes(abstract_detector(config), rules))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"model.safetensors": safetensors.numpy.save(state, {"format": "pt"})}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{model: {revision: files}} of small models as they are published, and of some that cannot be read."""
    made = tmp_path_factory.mktemp("models")
    small = seeded_files(folder_of(made / "detr", DETR | NARROW, preprocessor_config=SCALING))
    two_stage = DEFORMABLE | NARROW | {"with_box_refine": True, "two_stage": True}
    more = {"pytorch_model.bin": b"a pickle", "README.md": b"# DETR", "training_args.bin": b"a pickle"}
    weights = small["model.safetensors"]
    resnet = detr.get_config("r50")
    resnet.model.backbone.width = 2
    shapes = torch_shapes(abstract_detector(resnet).backbone, NameRules(tuple(resnet_rules())))
    head = {"fc.weight": np.zeros((10, 64), np.float32), "fc.bias": np.zeros(10, np.float32)}
    files = {
        "facebook/detr-small": {"main": small | more, "no_timm": small | {"config.json": b"{}"}},
        "SenseTime/deformable-two-stage": {"main": seeded_files(folder_of(made / "two", two_stage))},
        "timm/resnet50.tv_in1k": {
            "main": {
                "config.json": b'{"architecture": "resnet50", "num_classes": 10}',
                "model.safetensors": safetensors.numpy.save({**seeded_state_dict(shapes), **head}),
            }
        },
        "google/vit": {"main": {"config.json": b'{"model_type": "vit"}', "model.safetensors": weights}},
        "old/pickled": {"main": {"config.json": small["config.json"], "pytorch_model.bin": b"a pickle"}},
    }
    for name, change in {
        "other/classes": {"id2label": {"0": "cat", "1": "dog"}},
        "other/activation": {"activation_function": "gelu"},
        "other/backbone": TIMM | {"backbone": "resnet50d"},
        "other/levels": {"model_type": "deformable_detr", "num_feature_levels": 2},
        "other/width": {"d_model": "wide"},
        "other/queries": {"num_queries": 8},
    }.items():
        config = json.dumps(DETR | NARROW | change).encode()
        files[name] = {"main": {"config.json": config, "model.safetensors": weights}}
    return files


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """The hub that huggingface_hub asks in this test, with a cache of its own."""
    served = Hub(models)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
    address = f"{served.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    yield served
    served.close()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    return tmp_path / "photo.png"


# -------------------------------------------------------------------------------------------------- config.json

PUBLISHED = {
    ("detr", "r50"): DETR | TIMM,
    ("detr", "r101"): DETR | TIMM | {"backbone": "resnet101"},
    ("detr", "r50_dc5"): DETR | TIMM | {"dilation": True},
    ("detr", "r101_dc5"): DETR | {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet101"}},
    ("deformable_detr", "r50"): DEFORMABLE | TIMM,
    ("deformable_detr", "r50_single_scale"): DEFORMABLE | TIMM | {"num_feature_levels": 1},
    ("deformable_detr", "r50_single_scale_dc5"): DEFORMABLE | TIMM | {"num_feature_levels": 1, "dilation": True},
    ("deformable_detr", "r50_refine"): DEFORMABLE | TIMM | {"with_box_refine": True},
    ("deformable_detr", "r50_two_stage"): DEFORMABLE | TIMM | {"with_box_refine": True, "two_stage": True},
}
PUBLISHED["detr", "r101_dc5"]["backbone_config"]["output_stride"] = 16  # as the newest versions write dilation


@pytest.mark.parametrize("family, variant", PUBLISHED, ids=lambda name: name)
def test_config_json_chooses_the_config(tmp_path, family, variant):
    folder = folder_of(tmp_path / "model", PUBLISHED[family, variant])
    config = {"detr": detr, "deformable_detr": deformable_detr}[family].get_config(variant)
    config.model.backbone.weights = ""
    assert published_config(folder).to_dict() == config.to_dict()
    assert published_classes(folder) == ClassMap.from_categories(COCO_CATEGORIES.items())


def test_other_labels_and_sizes(tmp_path):
    """Labels are the classes; 800 and 1333 pixels are only where no file has others, in its old form or the new one."""
    folder = folder_of(tmp_path / "a", DETR | {"id2label": {"0": "N/A", "1": "cat", "2": "dog"}})
    assert published_classes(folder) == ClassMap((1, 2), ("cat", "dog"), (1, 2), 3)
    assert published_config(folder).model.num_classes == 3
    for number, stated in enumerate([SCALING, {"size": 96, "max_size": 160}]):
        data = published_config(folder_of(tmp_path / str(number), DETR, preprocessor_config=stated)).data
        assert (data.eval_scale, data.eval_max_size) == (96, 160)
    assert published_config(folder_of(tmp_path / "own", DETR | NARROW)).model.backbone.width == 4


# ------------------------------------------------------------------------------------------------------ detectors


@pytest.mark.parametrize("model", ["facebook/detr-small", "SenseTime/deformable-two-stage"])
def test_a_detector_is_its_files(hub, models, model):
    """Every array comes back; of the hub's files only those that are read were asked for."""
    detector, config, classes = load_detector(f"hf://{model}")
    state = to_torch_state(detector, LAYOUTS["hugging_face_resnet"][config.model.name](config.model))
    stored = safetensors.numpy.load(models[model]["main"]["model.safetensors"])
    for name, array in stored.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert (config.model.num_queries, classes.name(18)) == (7, "dog")
    fetched = {
        request.rpartition("/")[2] for request in hub.asked if request.startswith("GET") and "resolve" in request
    }
    assert fetched <= {"config.json", "model.safetensors", "preprocessor_config.json"} and len(fetched) >= 2


def test_offline_after_the_first_time(hub, monkeypatch):
    """And from a folder of ones own that has the same files, as where no hub can be reached."""
    first = find_detector("hf://facebook/detr-small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert load("hf://facebook/detr-small").classes.name(18) == "dog" and len(hub.asked) == asked
    arrays, again = (load_params(find_detector(place).items) for place in ("hf://facebook/detr-small", first.directory))
    assert arrays["decoder/query_position"].shape == (7, 32)
    assert all(np.array_equal(array, again[path]) for path, array in arrays.items())


def test_an_evaluation_of_a_name_needs_a_place(hub, capsys):
    """Not in the cache of the hub."""
    assert run(eval_program.main, ["eval", "--weights=hf://facebook/detr-small"]) == 1
    assert "--output is needed: hf://facebook/detr-small is no run of this package" in capsys.readouterr().err


def test_a_revision_is_a_branch_or_a_commit(hub):
    commit_hash = commit("facebook/detr-small", "main")
    by_hash, by_name = (find_detector(f"hf://facebook/detr-small{tail}") for tail in (f"@{commit_hash}", ""))
    assert by_hash == by_name and by_hash.directory.name == commit_hash
    with pytest.raises(UserError, match=r"config\.json is of no architecture; detr and deformable_detr can be read"):
        find_detector("hf://facebook/detr-small@no_timm").read_config()


def test_import_weights_takes_a_name(hub, tmp_path, capsys):
    """For what a name alone does not give: another number of queries, or of classes."""
    more = ["--torch=hf://facebook/detr-small", f"--output={tmp_path}/out", "--config.model.num_queries=9"]
    assert run(import_program.main, ["import_weights", *more, "--num_classes=3"]) == 0
    _, config, classes = load_detector(tmp_path / "out")
    assert (config.model.num_queries, config.model.embed_dim, classes.num_slots) == (9, 32, 3)
    assert "Re-initialised: heads/class_head/linear/kernel" in capsys.readouterr().out


def test_a_backbone(hub, models):
    """A ResNet with its classifier, in the names of timm and torchvision."""
    config = detr.get_config("r50")
    config.model.backbone.width = 2
    _, params, frozen = take_apart(abstract_detector(config))
    arrays = load_backbone(config.model.backbone.weights, {path: x.shape for path, x in {**params, **frozen}.items()})
    stored = safetensors.numpy.load(models["timm/resnet50.tv_in1k"]["main"]["model.safetensors"])
    expected = stored["layer4.2.conv3.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["backbone/stages/3/rest/layers/conv3/kernel"][1, 0, 0], expected[0, 0])


# ---------------------------------------------------------------------------------------------------- what fails


def test_a_broken_download_is_gone_on_with(hub, models):
    content = models["facebook/detr-small"]["main"]["model.safetensors"]
    hub.cut, hub.cuts = len(content) // 2, 2
    folder = names.fetch("hf://facebook/detr-small")
    assert (folder / "model.safetensors").read_bytes() == content and hub.cuts == 0
    assert sum("GET" in request and "model.safetensors" in request for request in hub.asked) == 3


def test_a_download_that_never_ends_is_one_sentence(hub):
    hub.cut, hub.cuts = 1000, 99
    with pytest.raises(UserError, match=r"^hf://facebook/detr-small was not fetched whole \(.*\): the same command tr"):
        names.fetch("hf://facebook/detr-small")
    hub.cuts = 0
    assert (names.fetch("hf://facebook/detr-small") / "model.safetensors").is_file()


def test_other_bytes_than_the_hub_says_are_refused_and_forgotten(hub):
    hub.forged = True
    with pytest.raises(
        UserError, match=r"model.safetensors of hf://facebook/detr-small is not what the hub has: its hash"
    ):
        names.fetch("hf://facebook/detr-small")
    hub.forged = False
    names.fetch("hf://facebook/detr-small")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("hf://facebook/nothing", "hf://facebook/nothing: {hub} has no model facebook/nothing, or it is private."),
        ("hf://facebook/detr-small@v9", "hf://facebook/detr-small@v9: facebook/detr-small has no revision v9."),
        ("hf://detr", "hf://detr is no name of the hub: it is hf://owner/name or hf://owner/name@revision."),
        ("hf://a/b/c", "hf://a/b/c is no name of the hub: it is hf://owner/name or hf://owner/name@revision."),
        ("hf://a/b--c", "hf://a/b--c is no name of the hub: "),
        (
            "hf://old/pickled",
            "hf://old/pickled has no model.safetensors; from the hub nothing else is read, and never a",
        ),
        ("hf://google/vit", "config.json is of vit; detr and deformable_detr can be read."),
        ("hf://timm/resnet50.tv_in1k", "is of resnet50, no detector: a ResNet is for config.model.backbone.weights."),
        ("hf://other/classes", "class_labels_classifier.bias is of 91 classes, and config.json beside it names 2."),
        ("hf://other/activation", "config.json: activation_function is 'gelu'; it can be relu."),
        ("hf://other/backbone", "config.json: the backbone is resnet50d; it can be resnet18, resnet34, resnet50 or "),
        ("hf://other/levels", "config.json: num_feature_levels is 2; it can be 1, or 3 and more."),
        ("hf://other/width", "config.json is no whole config: "),
        ("hf://other/queries", "/model.safetensors holds another model: decoder/query_position"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, photo, tmp_path, capsys, place, sentence):
    arguments = [f"--weights={place}", f"--images={photo}", f"--output={tmp_path / 'out'}"]
    assert run(predict_program.main, ["predict", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence.format(hub=hub.address) in error and error.splitlines()[-1].startswith("error: ")
    assert "pytorch_model.bin" not in " ".join(hub.asked) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_and_cache_one_sentence_says_what_to_fetch(hub, monkeypatch, offline):
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as refused:
        find_detector("hf://facebook/detr-small")
    address = f"{huggingface_hub.constants.ENDPOINT}/facebook/detr-small/resolve/main/model.safetensors"
    assert f"fetch {address} and its config.json elsewhere, put both into a folder here" in str(refused.value)
    assert "\n" not in str(refused.value) and not hub.asked


@pytest.mark.slow
def test_the_whole_program_with_HF_ENDPOINT(models, photo, tmp_path):
    """With the variables that people set; the second time the hub is gone."""
    served = Hub(models)
    home = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "deperceiver_jax", "predict", "--weights=hf://facebook/detr-small"]
    command += [f"--images={photo}", "--score_threshold=0"]
    found = []
    for number in range(2):
        output = tmp_path / str(number)
        environment = os.environ | home | {"HF_ENDPOINT": served.address}
        done = subprocess.run([*command, f"--output={output}"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and (output / "photo.png").is_file(), done.stderr
        found.append(json.loads((output / "detections.json").read_text()))
        if number == 0:
            served.close()
    assert {row["category_name"] for row in found[0]} <= set(COCO_CATEGORIES.values())
    assert found[0] == found[1] and len(found[0]) > 0

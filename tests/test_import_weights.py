"""import_weights as a person runs it: every kind of file, other classes, fine-tuning, and what goes wrong."""

import json
import os
import pickle
import re
import shlex
import signal
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy

from configs import deformable_detr, deperceiver, detr
from deperceiver_jax import eval as eval_program
from deperceiver_jax import export_weights as export_program
from deperceiver_jax import import_weights as program
from deperceiver_jax import load_detector
from deperceiver_jax import predict as predict_program
from deperceiver_jax import train as train_program
from deperceiver_jax.data.classes import ClassMap
from deperceiver_jax.program.command_line import has_config_file, parse_config, parse_flags, run
from deperceiver_jax.runs.stored_detector import find_detector, load_params
from deperceiver_jax.runs.workdir import flat_fields
from deperceiver_jax.weights.importing import abstract_arrays
from deperceiver_jax.weights.name_rules import NameRules, copies_of, to_torch, torch_shapes, with_copies
from deperceiver_jax.weights.tables import LAYOUTS
from deperceiver_jax.weights.tables.parts import resnet_rules
from deperceiver_jax.weights.torch_writer import write_state_dict
from tests.drawn_arrays import abstract_detector
from tests.seeded import seeded_state_dict
from tests.shared_work import abstract_detectors_are_shared  # noqa: F401

pytestmark = pytest.mark.slow

DETR = {
    "model.backbone.depth": 18,
    "model.backbone.width": 2,
    "model.embed_dim": 16,
    "model.encoder.num_layers": 2,
    "model.encoder.num_heads": 2,
    "model.encoder.mlp_dim": 8,
    "model.decoder.num_layers": 2,
    "model.decoder.num_heads": 2,
    "model.decoder.mlp_dim": 8,
}
DEFORMABLE_DETR = {**DETR, "model.embed_dim": 32}
BOTTLENECKS = {"model.backbone.depth": 50}
DEPERCEIVER = {"model.backbone.width": 2, "model.embed_dim": 32, "model.encoder.latent_dim": 32}
AUXILIARY = {"model.decoder.num_layers": 3, "model.decoder.self_attention": True, "model.decoder.final_norm": True}


def arguments_of(family: str, variant: str, fields: dict) -> list[str]:
    return [f"--config=configs/{family}.py:{variant}", *(f"--config.{name}={x}" for name, x in fields.items())]


def make_state(config, fields: dict, layout: str = "official", **sizes) -> dict[str, np.ndarray]:
    """A state dict of a small model with the names and numbers of latents and queries that a file has."""
    config.update_from_flattened_dict({**fields, **sizes})
    detector = abstract_detector(config)
    return seeded_state_dict(torch_shapes(detector, LAYOUTS[layout][config.model.name](config.model)))


def import_weights(*arguments) -> int:
    return run(program.main, ["import_weights", *map(str, arguments)])


def state_of(directory, layout: str = "official") -> dict[str, np.ndarray]:
    """The stored arrays under the names of `layout`."""
    stored = find_detector(directory)
    model = stored.read_config().model
    rules = LAYOUTS[layout][model.name](model)
    return with_copies(to_torch(load_params(stored.items), rules), rules)


@pytest.fixture(scope="module")
def detr_state():
    return make_state(detr.get_config("r50"), DETR, **{"model.num_queries": 7})


@pytest.fixture
def detr_file(detr_state, tmp_path):
    write_state_dict(tmp_path / "detr.pth", detr_state, wrapper="model")
    return tmp_path / "detr.pth"


DETR_ARGUMENTS = arguments_of("detr", "r50", DETR)


@pytest.mark.parametrize("layout", ["official", "hugging_face", "hugging_face_resnet"])
@pytest.mark.parametrize("learned", [False, True])
def test_detr(tmp_path, layout, learned, capsys):
    """The state dict comes back as it was, with COCO's classes and as many queries as the file has."""
    fields = DETR | (BOTTLENECKS if layout != "hugging_face" else {})
    fields |= {"model.position.encoding": "learned"} if learned else {}
    state = make_state(detr.get_config("r50"), fields, layout, **{"model.num_queries": 7})
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({**state, f"{next(iter(state))}.num_batches_tracked": np.array(3)}, path)
    assert import_weights(*arguments_of("detr", "r50", fields), f"--torch={path}", f"--output={tmp_path}/deep/out") == 0
    _, config, classes = load_detector(tmp_path / "deep" / "out")
    assert (config.model.num_queries, classes.num_slots, classes.name(18)) == (7, 91, "dog")
    back = state_of(tmp_path / "deep" / "out", layout)
    rules = LAYOUTS[layout]["detr"](config.model)
    assert set(back) == set(with_copies(state, rules))  # learned positions have two places
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    printed = capsys.readouterr().out
    assert f"Loaded: {len(state)} arrays of {path} into " in printed
    assert "Passed over: 1 arrays that are no parameters" in printed
    assert "The file has config.model.num_queries=7: train.py needs it beside config.init_from." in printed
    assert "Re-initialised" not in printed


@pytest.mark.parametrize(
    ("variant", "decoder"), [("r50_32", {}), ("r50_4", {}), ("r50_multiscale", {}), ("r50_32", AUXILIARY)]
)
def test_deperceiver(tmp_path, variant, decoder):
    """A Lightning checkpoint, in half precision, whose number of latents is its own."""
    fields = DEPERCEIVER | decoder
    sizes = {"model.num_queries": 5, "model.encoder.num_latents": 6}
    state = make_state(deperceiver.get_config(variant), fields, **sizes)
    state = {f"module.{name}": array.astype(np.float16) for name, array in state.items()}
    extra = {"module.criterion.empty_weight": np.ones(92, np.float32)}
    write_state_dict(tmp_path / "x.pth", {**state, **extra}, wrapper="state_dict")
    path = (tmp_path / "x.pth").rename(tmp_path / "last.ckpt")
    arguments = arguments_of("deperceiver", variant, fields)
    assert import_weights(*arguments, f"--torch={path}", f"--output={tmp_path}/out") == 0
    _, config, _ = load_detector(tmp_path / "out")
    assert (config.model.num_queries, config.model.encoder.num_latents) == (5, 6)
    back = state_of(tmp_path / "out")
    assert {f"module.{name}" for name in back} == set(state)
    for name, array in back.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[f"module.{name}"], err_msg=name)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("r50_single_scale", "hugging_face"),
        ("r50", "hugging_face_resnet"),
        ("r50_refine", "hugging_face"),
        ("r50_two_stage", "official"),
        ("r50_two_stage", "hugging_face"),
    ],
)
def test_deformable_detr(tmp_path, variant, layout, capsys):
    """Official files hold shared arrays several times; transformers keeps one of them, and of two names the longer."""
    config = deformable_detr.get_config(variant)
    fields = DEFORMABLE_DETR | (BOTTLENECKS if layout == "hugging_face_resnet" else {})
    state = make_state(config, fields, layout, **{"model.num_queries": 7})
    rules = LAYOUTS[layout]["deformable_detr"](config.model)
    held = with_copies(state, rules)
    if layout == "hugging_face":
        left_out = [name if copy.startswith("model.") else copy for copy, name in copies_of(state, rules).items()]
        assert left_out
        held = {name: array for name, array in held.items() if name not in left_out}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(held, path)
    arguments = arguments_of("deformable_detr", variant, fields)
    assert import_weights(*arguments, f"--torch={path}", f"--output={tmp_path}/out") == 0
    assert "Re-initialised" not in capsys.readouterr().out
    _, config, classes = load_detector(tmp_path / "out")
    assert config.model.num_queries == (300 if config.model.two_stage else 7)  # proposals are no parameters
    assert classes.name(18) == "dog"
    back = state_of(tmp_path / "out", layout)
    assert set(back) == set(with_copies(state, rules))
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_deformable_detr_with_other_classes(tmp_path, capsys):
    """All class heads start anew, the proposals' too; their copies in the file are no obstacle."""
    config = deformable_detr.get_config("r50_two_stage")
    state = make_state(config, DEFORMABLE_DETR)
    rules = LAYOUTS["official"]["deformable_detr"](config.model)
    write_state_dict(tmp_path / "x.pth", with_copies(state, rules), wrapper="model")
    files = [f"--torch={tmp_path}/x.pth", f"--output={tmp_path}/out", "--num_classes=3"]
    assert import_weights(*arguments_of("deformable_detr", "r50_two_stage", DEFORMABLE_DETR), *files) == 0
    assert "Re-initialised: decoder/layers/layers/heads/class_head/linear/kernel" in capsys.readouterr().out
    back = state_of(tmp_path / "out")
    assert {name for name in state if not np.array_equal(back[name], state[name])} == {
        f"class_embed.{layer}.{part}" for layer in range(3) for part in ("weight", "bias")
    }
    assert back["class_embed.2.weight"].shape == (3, 32)


def test_only_a_backbone(tmp_path, capsys):
    """A torchvision ResNet: everything else is new."""
    config = detr.get_config("r50")
    config.update_from_flattened_dict(DETR)
    detector = abstract_detector(config)
    state = seeded_state_dict(torch_shapes(detector.backbone, NameRules(tuple(resnet_rules()))))
    extra = {"fc.weight": np.zeros((10, 64), np.float32), "fc.bias": np.zeros(10, np.float32)}
    safetensors.numpy.save_file({**state, **extra}, tmp_path / "resnet.safetensors")
    files = [f"--torch={tmp_path}/resnet.safetensors", f"--output={tmp_path}/out"]
    assert import_weights(*DETR_ARGUMENTS, *files) == 0
    assert "Re-initialised: the other " in capsys.readouterr().out
    arrays = load_params(find_detector(tmp_path / "out").items)
    np.testing.assert_array_equal(arrays["backbone/stem_conv/kernel"], state["conv1.weight"].transpose(2, 3, 1, 0))
    assert set(arrays) == set(abstract_arrays(config))
    assert 0.5 < arrays["heads/box_head/mlp/layers/0/kernel"].std() * 48**0.5 < 1.5  # uniform, up to 1 / sqrt(16)
    assert 0.5 < arrays["decoder/query_position"].std() < 1.5
    assert np.all(arrays["decoder/norm/scale"] == 1)


def test_other_classes_and_more_queries(tmp_path, detr_state, detr_file, capsys):
    """The class head starts anew, queries are copied as far as they go, everything else is the file's."""
    more = ["--num_classes=3", "--config.model.num_queries=9"]
    assert import_weights(*DETR_ARGUMENTS, *more, f"--torch={detr_file}", f"--output={tmp_path}/out") == 0
    printed = capsys.readouterr().out
    assert "Re-initialised: heads/class_head/linear/kernel: class_embed." in printed
    assert "Re-initialised: decoder/query_position: the file has 7, and the first 7 of these 9 are its.\n" in printed
    back = state_of(tmp_path / "out")
    assert set(back) == set(detr_state)
    assert back["class_embed.weight"].shape == (4, 16) and back["class_embed.weight"].std() > 0.01
    np.testing.assert_array_equal(back["query_embed.weight"][:7], detr_state["query_embed.weight"])
    assert back["query_embed.weight"].shape == (9, 16) and back["query_embed.weight"][7:].std() > 0.5
    for name in back.keys() - {"class_embed.weight", "class_embed.bias", "query_embed.weight"}:
        np.testing.assert_array_equal(back[name], detr_state[name], err_msg=name)
    assert load_detector(tmp_path / "out")[2].names == ("class 0", "class 1", "class 2")

    fewer = ["--num_classes=3", "--config.model.num_queries=4"]
    assert import_weights(*DETR_ARGUMENTS, *fewer, f"--torch={detr_file}", f"--output={tmp_path}/fewer") == 0
    back = state_of(tmp_path / "fewer")
    np.testing.assert_array_equal(back["query_embed.weight"], detr_state["query_embed.weight"][:4])


def test_classes_that_the_head_has_are_kept(tmp_path, capsys):
    """A file that was trained on three classes, and the classes.json that names them."""
    sizes = {"model.num_queries": 7, "model.num_classes": 3}
    state = make_state(detr.get_config("r50"), DETR, **sizes)
    write_state_dict(tmp_path / "x.pth", state, wrapper="model")
    classes = ClassMap.from_categories([(5, "cup"), (9, "plate"), (12, "spoon")])
    (tmp_path / "classes.json").write_text(classes.to_json())
    files = [f"--torch={tmp_path}/x.pth", f"--output={tmp_path}/out"]
    assert import_weights(*DETR_ARGUMENTS, *files) == 1
    sentence = "class_embed.bias has the shape [4], and these classes need [92]: give --classes=FILE or --num_classes=N"
    assert sentence in capsys.readouterr().err
    assert import_weights(*DETR_ARGUMENTS, *files, f"--classes={tmp_path}/classes.json") == 0
    assert load_detector(tmp_path / "out")[2] == classes
    np.testing.assert_array_equal(state_of(tmp_path / "out")["class_embed.weight"], state["class_embed.weight"])


def test_leftovers_when_told(tmp_path, detr_state, capsys):
    """One layer's bias is missing: its parameter starts anew in all layers. A mask head has no place."""
    lost = "transformer.decoder.layers.1.linear1.bias"
    state = {name: array for name, array in detr_state.items() if name != lost}
    state["mask_head.lay1.weight"] = np.ones((2, 2), np.float32)
    write_state_dict(tmp_path / "x.pth", state, wrapper="model")
    files = [f"--torch={tmp_path}/x.pth", f"--output={tmp_path}/out", "--allow_leftovers"]
    assert import_weights(*DETR_ARGUMENTS, *files) == 0
    printed = capsys.readouterr().out
    assert "Passed over: mask_head.lay1.weight, for which this model has no place." in printed
    assert "Re-initialised: decoder/layers/layers/mlp/layers/0/bias: it is not in the file." in printed
    back = state_of(tmp_path / "out")
    for name in detr_state.keys() - {lost, lost.replace(".1.", ".0.")}:
        np.testing.assert_array_equal(back[name], detr_state[name], err_msg=name)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def write_hostile(path, state):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Hostile()}, protocol=2))


def write_cut(path, state):
    write_state_dict(path, state, wrapper="model")
    path.write_bytes(path.read_bytes()[:-1000])


def changed(**arrays):
    """Writes the state dict with these arrays, or without those that are None."""

    def write(path, state):
        kept = {name: array for name, array in {**state, **arrays}.items() if array is not None}
        write_state_dict(path, kept, wrapper="model")

    return write


@pytest.mark.parametrize(
    ("write", "arguments", "sentence"),
    [
        (write_hostile, [], "system, which no weights need"),
        (write_cut, [], "x.pth is damaged, cut short or not a checkpoint"),
        (changed(**{"query_embed.weight": None}), [], "x.pth lacks query_embed.weight, which this model needs"),
        (changed(surprise=np.zeros(3)), [], "x.pth holds surprise, which this model does not have"),
        (
            changed(**{"bbox_embed.layers.2.bias": np.zeros(5)}),
            ["--allow_leftovers"],
            "bbox_embed.layers.2.bias has the shape [5] in ",
        ),
        (changed(**{"query_embed.weight": np.zeros((7, 5))}), [], "query_embed.weight has the shape [7, 5] in "),
        (changed(), ["--config.model.backbone.depth=34"], "x.pth lacks backbone.0.body.layer1.2.bn1.bias, "),
        (changed(), ["--config.model.embed_dim=32"], "in_proj_bias has the shape [48] in "),
        (changed(), ["--num_classes=3", "--classes=x.json"], "--classes and --num_classes are both given"),
        (changed(), ["--num_classes=0"], "--num_classes is 0"),
        (changed(), ["--classes=/nowhere.json"], "/nowhere.json does not exist"),
        (changed(), ["--torch={}/full"], "/full is a folder without model.safetensors; name a file of weights."),
        (changed(), ["--torch=/nowhere.pth"], "Cannot read the weights /nowhere.pth"),
        (changed(), ["--output={}/full"], "/full exists already"),
        (changed(), ["--output={}/x.pth/out"], "x.pth/out cannot be written"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, detr_state, capsys, write, arguments, sentence):
    write(tmp_path / "x.pth", detr_state)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    files = [f"--torch={tmp_path}/x.pth", f"--output={tmp_path}/out"]
    assert import_weights(*DETR_ARGUMENTS, *files, *(argument.format(tmp_path) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not os.path.exists("pwned")


@pytest.mark.parametrize(("family", "variant"), [("deperceiver", "r50_16"), ("detr", "r50")])
def test_another_architecture(tmp_path, capsys, detr_state, family, variant):
    """DETR's weights for a DePerceiver, and the other way round."""
    state = detr_state if family == "deperceiver" else make_state(deperceiver.get_config("r50_32"), DEPERCEIVER)
    write_state_dict(tmp_path / "x.pth", state, wrapper="model")
    files = [f"--torch={tmp_path}/x.pth", f"--output={tmp_path}/out"]
    assert import_weights(f"--config=configs/{family}.py:{variant}", *files, "--allow_leftovers") == 1
    named = "perceiver.decoder.cross_attention." if family == "deperceiver" else "transformer.decoder.layers.0."
    assert f"x.pth is of another architecture than {family}: it lacks {named}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def three_classes(tmp_path):
    """A COCO directory of eight images with a cup, a plate or a spoon each."""
    root = tmp_path / "kitchen"
    categories = [{"id": 5, "name": "cup"}, {"id": 9, "name": "plate"}, {"id": 12, "name": "spoon"}]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(8):
            pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
            (root / f"{split}2017" / f"{i}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
            images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
            box = {"bbox": [4, 5, 20, 30], "area": 600, "iscrowd": 0, "category_id": categories[i % 3]["id"]}
            annotations.append({"id": i, "image_id": i, **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def test_fine_tuning(tmp_path, three_classes, capsys):
    """COCO's weights, a folder of three classes: only the class head is new, and predict.py says the right names."""
    smaller = {"model.encoder.num_layers": 1, "model.decoder.num_layers": 1, "model.backbone.frozen_stages": 4}
    model = arguments_of("detr", "r50", DETR | smaller)
    before = make_state(detr.get_config("r50"), DETR | smaller, **{"model.num_queries": 7})
    write_state_dict(tmp_path / "detr.pth", before, wrapper="model")
    assert import_weights(*model, f"--torch={tmp_path}/detr.pth", f"--output={tmp_path}/coco") == 0
    fields = {
        "model.num_queries": 7,
        "init_from": tmp_path / "coco",
        "data.directory": three_classes,
        "data.prepared_directory": tmp_path / "prepared",
        "data.batch_size": 8,
        "data.num_workers": 0,
        "data.buckets": 1,
        "data.eval_buckets": 1,
        "data.scales": "(48,)",
        "data.crop_probability": 0.0,
        "data.eval_scale": 48,
        "eval.batch_size": 8,
        "matcher.backend": "device",
        "optimizer.learning_rate": 0.0,  # what is kept can be told from what is learned
        "train.num_steps": 2,
        "train.eval_every": -1,
        "train.compilation_cache": tmp_path / "compiled",
    }
    workdir = tmp_path / "run"
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    arguments = [*model, *arguments_of("detr", "r50", fields)[1:], f"--workdir={workdir}"]
    try:
        assert run(train_program.main, ["train.py", *arguments]) == 0
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    reason = "all but the class head, which starts anew: it has 91 class slots, and this data has 3."
    assert reason in capsys.readouterr().out

    classes = load_detector(workdir)[2]
    assert (classes.names, classes.slots, classes.num_slots) == (("cup", "plate", "spoon"), (0, 1, 2), 3)
    state = state_of(workdir)
    assert state["class_embed.weight"].shape == (4, 16)
    for name in before.keys() - {"class_embed.weight", "class_embed.bias"}:
        np.testing.assert_array_equal(state[name], before[name], err_msg=name)

    images = f"--images={three_classes}/val2017"
    found = [f"--workdir={workdir}", images, f"--output={tmp_path}/found", "--score_threshold=0"]
    assert run(predict_program.main, ["predict.py", *found, "--config.eval.batch_size=8"]) == 0
    entries = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(entries) == 8 * 7
    assert {(e["category_id"], e["category_name"]) for e in entries} <= {(5, "cup"), (9, "plate"), (12, "spoon")}


def test_the_guides_commands_exist():
    """Programs, config files, variants and fields of docs/finetuning.md."""
    text = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]
    programs = {"train.py": train_program, "predict.py": predict_program, "eval.py": eval_program}
    programs |= {"import_weights": program, "export_weights": export_program}
    assert len(commands) == 10
    for command in commands:
        name = command[2].split(".")[-1] if command[1] == "-m" else command[1]
        _, rest = parse_flags([name, *command[3 if command[1] == "-m" else 2 :]], programs[name].define_flags, "")
        assert has_config_file(rest) == (name in ("train.py", "import_weights"))
        if has_config_file(rest):
            parse_config(rest)
    for field in re.findall(r"--config\.([\w.]+)=", text):
        assert field in flat_fields(detr.get_config("r50")), field

"""export_weights as a person runs it: what import_weights reads back is the same to the bit, for every layout."""

import functools
import zipfile

import numpy as np
import pytest

from configs import deformable_detr, deperceiver, detr, smca
from deperceiver_jax import export_weights as program
from deperceiver_jax import import_weights
from deperceiver_jax.data.classes import COCO_CATEGORIES, ClassMap
from deperceiver_jax.program.command_line import run
from deperceiver_jax.runs.stored_detector import find_detector, load_params, save_params
from deperceiver_jax.runs.workdir import config_text
from deperceiver_jax.weights.importing import abstract_arrays
from deperceiver_jax.weights.torch_checkpoint import read_state_dict
from deperceiver_jax.weights.torch_writer import write_state_dict
from tests.shared_work import abstract_detectors_are_shared  # noqa: F401

pytestmark = pytest.mark.slow

SMALL = {
    "detr": {
        "model.backbone.width": 2,
        "model.embed_dim": 16,
        "model.num_queries": 7,
        "model.encoder.num_heads": 2,
        "model.encoder.mlp_dim": 8,
        "model.decoder.num_heads": 2,
        "model.decoder.mlp_dim": 8,
    },
    "deformable_detr": {
        "model.backbone.width": 2,
        "model.embed_dim": 32,
        "model.num_queries": 7,
        "model.encoder.num_heads": 2,
        "model.encoder.mlp_dim": 8,
        "model.decoder.num_heads": 2,
        "model.decoder.mlp_dim": 8,
    },
    "deperceiver": {
        "model.backbone.width": 2,
        "model.embed_dim": 32,
        "model.num_queries": 5,
        "model.encoder.latent_dim": 32,
        "model.encoder.num_latents": 6,
    },
    "smca": {
        "model.backbone.width": 2,
        "model.embed_dim": 16,
        "model.num_queries": 7,
        "model.encoder.mlp_dim": 8,
        "model.decoder.mlp_dim": 8,
    },
}


def export(*arguments) -> int:
    return run(program.main, ["export_weights", *map(str, arguments)])


def import_(family, variant, fields, *arguments) -> int:
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["import_weights", f"--config=configs/{family}.py:{variant}", *overrides, *map(str, arguments)]
    return run(import_weights.main, command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, random_arrays):
    """(directory, arrays by path) of random weights for a variant at small size; nobody writes into it."""

    @functools.cache
    def make(family, variant, *changes):
        files = {"detr": detr, "deformable_detr": deformable_detr, "deperceiver": deperceiver, "smca": smca}
        config = files[family].get_config(variant)
        config.update_from_flattened_dict({**SMALL[family], **dict(changes)})
        arrays = random_arrays(abstract_arrays(config))
        classes = ClassMap.from_categories(COCO_CATEGORIES.items())
        directory = tmp_path_factory.mktemp(family) / "trained"
        save_params(directory, arrays, config_text(config), classes.to_json())
        return directory, arrays

    return make


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("family", "variant", "layout", "count"),
    [
        ("detr", "r50", "official", 458),
        ("detr", "r50_dc5", "hugging_face", 530),
        ("deformable_detr", "r50_two_stage", "hugging_face", 654),
        ("deperceiver", "r50_32", "official", 410),
        ("deperceiver", "r50_multiscale", "official", 417),
        ("smca", "r50_single_scale", "official", 500),
        ("smca", "r50_multiscale_conv", "official", 593),
    ],
)
def test_what_comes_back_is_the_same_to_the_bit(tmp_path, trained, capsys, family, variant, layout, count, ending):
    """As many arrays as the published files have."""
    weights, arrays = trained(family, variant)
    file = tmp_path / "deep" / f"exported{ending}"
    assert export(f"--weights={weights}", f"--output={file}", f"--layout={layout}") == 0
    printed = capsys.readouterr().out
    assert f"Wrote {file}: {count} arrays of" in printed and "otherwise" not in printed
    assert len(read_state_dict(file)) == count
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert import_(family, variant, SMALL[family], f"--torch={file}", f"--output={tmp_path}/back") == 0
    back = load_params(find_detector(tmp_path / "back").items)
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        assert back[path].dtype == array.dtype
        np.testing.assert_array_equal(back[path], array, err_msg=path)


def test_detr_as_the_official_code_has_it(tmp_path, trained):
    """Queries, keys and values are one array again, layers have their own."""
    weights, arrays = trained("detr", "r50")
    assert export(f"--weights={weights}", f"--output={tmp_path}/x.pth") == 0
    state = read_state_dict(tmp_path / "x.pth")
    attention = "decoder/layers/layers/cross_attention"
    parts = [arrays[f"{attention}/{part}/kernel"][3].T for part in ("query", "key", "value")]
    name = "transformer.decoder.layers.3.multihead_attn"
    np.testing.assert_array_equal(state[f"{name}.in_proj_weight"], np.concatenate(parts))
    np.testing.assert_array_equal(state[f"{name}.out_proj.weight"], arrays[f"{attention}/out/kernel"][3].T)
    assert state["input_proj.weight"].shape == (16, 64, 1, 1)


def test_a_run_with_its_moving_average_and_classes(tiny_run, tmp_path, capsys):
    """tiny_run's step 7 has an average that is 1.5 times its parameters, which those of step 3 are."""
    states = []
    for checkpoint in ("latest", "best"):
        file = tmp_path / f"{checkpoint}.pth"
        assert export(f"--workdir={tiny_run}", f"--checkpoint={checkpoint}", f"--output={file}") == 0
        states.append(read_state_dict(file))
    printed = capsys.readouterr().out
    assert "checkpoints/7 under official names" in printed and f"2 class slots are named by {tiny_run}" in printed
    assert "config.model.encoder.num_blocks is 1 here and 3 there." in printed
    np.testing.assert_allclose(states[0]["class_embed.weight"], 1.5 * states[1]["class_embed.weight"], rtol=1e-6)
    for name in (name for name in states[0] if name.endswith("running_var")):
        np.testing.assert_array_equal(states[0][name], states[1][name])
    np.testing.assert_array_equal(states[0]["criterion.empty_weight"], np.float32([1, 1, 0.1]))


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({}, ["--output={}/x.txt"], "x.txt is to end in .pth or .safetensors"),
        ({}, ["--output={}/here.pth"], "here.pth exists already"),
        ({}, ["--output={}/here.pth/x.pth"], "here.pth/x.pth cannot be written"),
        ({}, [], "--output is needed"),
        ({}, ["--output={}/x.pth", "--workdir={}"], "--workdir and --weights are both given"),
        ({}, ["--output={}/x.pth", "--layout=detectron"], "flag --layout=detectron"),
        (
            {"model.pre_norm": True},
            ["--output={}/x.pth", "--layout=hugging_face"],
            "This model has encoder/norm/bias, encoder/norm/scale, for which the published checkpoints have no name",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, trained, capsys, changes, arguments, sentence):
    weights, _ = trained("detr", "r50", *changes.items())
    (tmp_path / "here.pth").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert export(f"--weights={weights}", *(argument.format(tmp_path) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_published_code_computes_otherwise_is_said(tmp_path, trained, capsys):
    weights, _ = trained("deformable_detr", "r50_single_scale", ("model.places", "pixels"))
    assert export(f"--weights={weights}", f"--output={tmp_path}/x.pth") == 0
    assert "config.model.places is 'pixels' here and 'cells' there." in capsys.readouterr().out


def test_latents_as_queries_have_no_published_names(tmp_path, trained, capsys):
    latents = {"model.decoder.num_layers": 0, "model.encoder.num_latents": 7, "model.num_queries": 7}
    weights, _ = trained("deperceiver", "r50_32", *latents.items())
    assert export(f"--weights={weights}", f"--output={tmp_path}/x.pth") == 1
    assert "config.model.decoder.num_layers is 0" in capsys.readouterr().err


def test_deperceiver_is_not_in_transformers(tmp_path, trained, capsys):
    weights, _ = trained("deperceiver", "r50_32")
    arguments = [f"--weights={weights}", f"--output={tmp_path}/x.pth", "--layout=hugging_face"]
    assert export(*arguments) == 1
    assert "--layout: hugging_face has no names for deperceiver." in capsys.readouterr().err


STATE = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "half": np.array([1.5, -2], np.float16),
    "count": np.array(2**40),
    "empty": np.zeros((0, 3), np.float32),
}


def test_archives_are_the_ones_that_pytorch_reads(tmp_path):
    """The members that torch.load asks for, stored as they are, and the same bytes at every writing."""
    for name in ("a.pth", "b.pth"):
        write_state_dict(tmp_path / name, STATE, wrapper="model")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        members = {info.filename: info for info in archive.infolist()}
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/data/0") == np.ascontiguousarray(STATE["matrix"]).tobytes()
    assert set(members) == {
        f"archive/{x}" for x in ("data.pkl", "byteorder", "version", *map("data/{}".format, range(4)))
    }
    assert all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
    back = read_state_dict(tmp_path / "a.pth")
    for name, array in STATE.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(TypeError, match="no numbers of the type uint16"):
        write_state_dict(tmp_path / "c.pth", {"a": np.zeros(3, np.uint16)}, wrapper="model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]


@pytest.mark.torch
def test_pytorch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    write_state_dict(tmp_path / "a.pth", STATE, wrapper="model")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert set(loaded) == set(STATE)
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)

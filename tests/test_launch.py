"""launch/: every file is well formed, and every command in it is one that the programs take."""

import math
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from deperceiver_jax.preflight.chips import CHIPS
from tests.test_docs import Command, check_package_program

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
JOBSETS = {"jobset_one_slice.yaml": 1, "jobset_two_slices.yaml": 2}
CHIPS_A_HOST = 4  # of a ct5lp-hightpu-4t


def yaml_of(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def texts(content):
    """All strings in it."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from texts(part)


def scripts():
    """(file, shell program) of all files, also of what a yaml or a flag holds."""
    for path in sorted(LAUNCH.iterdir()):
        if path.suffix == ".sh":
            yield path.name, path.read_text()
            for words in map(shlex.split, [path.read_text().replace("\\\n", "")]):
                yield from ((path.name, w.removeprefix("--command=")) for w in words if w.startswith("--command="))
        elif path.suffix == ".yaml":
            yield from ((path.name, text) for text in texts(yaml_of(path.name)) if "\n" in text)


def commands(program="train"):
    """(file, arguments) of every `deperceiver PROGRAM` in them."""
    found = []
    for name, script in scripts():
        for line in re.sub(r"#.*", "", script).replace("\\\n", " ").splitlines():
            if "--command=" not in line and (match := re.search(rf"\bdeperceiver {program} ([^&]*)", line)):
                found.append((name, shlex.split(match[1])))
    return found


def test_every_script_is_a_shells():
    assert {name for name, _ in scripts()} == {path.name for path in LAUNCH.iterdir()} - {"Dockerfile"}
    for name, script in scripts():
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0 and not checked.stderr, f"{name}: {checked.stderr}"


def test_every_command_is_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sorted({name for name, _ in commands()}) == sorted(path.name for path in LAUNCH.iterdir())[1:]
    for _, arguments in commands():
        check_package_program(Command("deperceiver train", arguments))
    assert sorted(name for name, _ in commands("data")) == ["skypilot_gpus.yaml", "skypilot_tpu.yaml", "xpk.sh"]
    for name in JOBSETS:
        (job,) = yaml_of(name)["spec"]["replicatedJobs"]
        (first,) = job["template"]["spec"]["template"]["spec"]["initContainers"]
        assert first["command"][:2] == ["deperceiver", "data"]
        check_package_program(Command("deperceiver data", first["command"][2:]))
    for name, arguments in commands("data"):
        check_package_program(Command("deperceiver data", arguments))
        (trained,) = (rest for file, rest in commands() if file == name)
        assert f"--config.data.directory={arguments[1]}" in trained


def test_every_run_has_a_place_that_all_hosts_see_and_a_batch_that_divides():
    chips = {"jobset_one_slice.yaml": 16, "jobset_two_slices.yaml": 32, "skypilot_tpu.yaml": 16, "xpk.sh": 32}
    for name, arguments in commands():
        given = dict(argument.split("=", 1) for argument in arguments)
        assert given["--workdir"].startswith("/shared/" if name == "slurm.sh" else "gs://")
        assert given.get("--stopped_status", "0") == ("75" if name in JOBSETS or name == "xpk.sh" else "0"), name
        assert int(given["--config.data.batch_size"]) % chips.get(name, 16) == 0


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_have_hosts_for_all_chips_and_mount_what_they_name(name):
    content = yaml_of(name)
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = content["spec"]["replicatedJobs"]
    assert job["replicas"] == JOBSETS[name]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": CHIPS_A_HOST}
    assert spec["parallelism"] == spec["completions"] == chips / CHIPS_A_HOST
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {mount["name"] for each in [*pod["initContainers"], container] for mount in each["volumeMounts"]}
    assert mounted == volumes
    (shared,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    assert {"name": shared, "emptyDir": {"medium": "Memory"}} in pod["volumes"]


def test_tpus_are_called_as_preflight_calls_them():
    assert yaml_of("skypilot_tpu.yaml")["resources"]["accelerators"] == f"tpu-{CHIPS['v5e'].accelerator}-16"
    assert f"--tpu-type={CHIPS['v5e'].accelerator}-16 --num-slices=2" in (LAUNCH / "xpk.sh").read_text()


def test_extras_that_are_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in LAUNCH.iterdir():
        for named in re.findall(r"pip install [^\n]*\[([\w,]+)\]", path.read_text()):
            assert set(named.split(",")) <= set(extras), path.name

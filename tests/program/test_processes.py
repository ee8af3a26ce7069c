"""How processes find one another: what the environment says, what flags say, and what mistakes get."""

import http.server
import threading
from types import SimpleNamespace

import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.program import processes


def flags(distributed=None, coordinator_address=None, process_count=None, process_id=None):
    return SimpleNamespace(**locals())


def join(monkeypatch, values, environment):
    """The arguments of jax.distributed.initialize, or None where it is not called."""
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    processes.join(values, environment)
    return calls[0] if calls else None


ALONE = [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"SLURM_NTASKS": "8"}]
SEVERAL = [
    {"SLURM_STEP_NUM_TASKS": "16"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"MEGASCALE_NUM_SLICES": "2"},
    {"TPU_WORKER_HOSTNAMES": "host-0,host-1"},
]


@pytest.mark.parametrize("environment", ALONE, ids=str)
def test_alone_unless_the_environment_says_otherwise(monkeypatch, environment):
    assert join(monkeypatch, flags(), environment) is None


@pytest.mark.parametrize("environment", SEVERAL, ids=str)
def test_joined_when_the_environment_says_so(monkeypatch, environment):
    arguments = join(monkeypatch, flags(), environment)
    assert arguments["cluster_detection_method"] is None and "coordinator_address" not in arguments
    assert join(monkeypatch, flags(distributed=False), environment) is None


def test_joined_when_a_flag_says_so(monkeypatch):
    assert join(monkeypatch, flags(distributed=True), {}) is not None


def test_flags_by_hand_come_before_variables(monkeypatch):
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    arguments = join(monkeypatch, flags(), variables)
    assert (arguments["coordinator_address"], arguments["num_processes"], arguments["process_id"]) == ("a:1", 3, 2)
    arguments = join(monkeypatch, flags(None, "b:2", 4, 0), variables | SEVERAL[0])
    assert (arguments["coordinator_address"], arguments["num_processes"], arguments["process_id"]) == ("b:2", 4, 0)
    assert arguments["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
    ],
    ids=str,
)
def test_gpus_that_slurm_gives_a_process_alone_are_the_first_that_it_sees(monkeypatch, variables, devices):
    """--gpus-per-task: whichever of the machine's they are."""
    environment = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3", **variables}
    assert join(monkeypatch, flags(), environment)["local_device_ids"] == devices
    assert join(monkeypatch, flags(None, "b:2", 4, 0), environment)["local_device_ids"] is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (flags(process_count=2), "--coordinator_address and --process_id must be given too"),
        (flags(None, "host", 2, 0), "--coordinator_address is host; it must be HOST:PORT"),
        (flags(None, "host:1", 2, 2), "--process_id is 2, which is not one of 0 to 1"),
        (flags(False, "host:1", 2, 1), "--nodistributed contradicts"),
    ],
    ids=["missing", "address", "id", "contradiction"],
)
def test_what_is_wrong_is_one_sentence(monkeypatch, values, sentence):
    with pytest.raises(UserError, match=sentence):
        join(monkeypatch, values, {})


def test_a_cluster_that_is_none_is_one_sentence(monkeypatch):
    def initialize(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="should be defined. Name them by hand: --coordinator_address"):
        processes.join(flags(distributed=True), {})


def test_who_does_not_come_is_not_waited_for_for_ever(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(processes, "START_TIMEOUT", 0.01)
    monkeypatch.setattr(processes, "_leaving", threading.Lock())
    monkeypatch.setattr(processes.os, "_exit", lambda status: ended.set() if status == 1 else None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: ended.wait(30))
    processes.join(flags(None, "host:1", 2, 0), {})
    assert ended.is_set()
    assert capfd.readouterr().err == "error: not all of 2 processes at host:1 came within 0.01 s.\n"


@pytest.mark.parametrize(("hosts", "several"), [("a:b:10.0.0.1,a:b:10.0.0.2", True), ("10.0.0.1", False)])
def test_a_tpu_machine_asks_how_many_hosts_its_slice_has(monkeypatch, hosts, several):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path.endswith("/worker-network-endpoints") and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(hosts.encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert processes.several_announced(environment) is several
        assert not processes.several_announced(environment | {"TPU_SKIP_MDS_QUERY": "1"})


@pytest.mark.parametrize(
    ("error", "last_line"),
    [
        (UserError("It is broken."), "error: It is broken."),
        (
            ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer.\nmore"),
            "error: Another process of this run ended or cannot be reached (UNKNOWN: Gloo all-reduce failed: "
            "Connection closed by peer). Start the same command again on all machines: a run continues from its last "
            "checkpoint.",
        ),
        (ZeroDivisionError("by 0"), "error: This process of the run ends here, and so do the others."),
    ],
    ids=["user error", "lost process", "bug"],
)
def test_one_of_several_leaves_at_once_with_a_sentence(monkeypatch, capfd, error, last_line):
    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.os, "_exit", end)
    monkeypatch.setattr(processes, "_leaving", threading.Lock())
    with pytest.raises(SystemExit, match="1"):
        processes.leave(error)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == last_line
    assert (len(lines) > 1) == isinstance(error, ZeroDivisionError)


def test_one_alone_does_not_leave():
    assert processes.leave(UserError("It is broken.")) is None

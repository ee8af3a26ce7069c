"""The command: it starts, says where, and ends with Ctrl-C; mistakes are one sentence."""

import http.client
import re
import signal
import socket
import subprocess
import sys

import pytest

from deperceiver_jax.app import serve
from deperceiver_jax.app.__main__ import main
from deperceiver_jax.program.command_line import run


@pytest.mark.slow
def test_it_runs_until_ctrl_c(tiny_run, request):
    command = [sys.executable, "-m", "deperceiver_jax", "app", f"--workdir={tiny_run}", "--port=0"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=request.config.rootpath, **pipe) as app:
        try:
            said = app.stdout.readline()
            port = re.fullmatch(r".*/7 is at http://127\.0\.0\.1:(\d+) until Ctrl-C\.\n", said)[1]
            connection = http.client.HTTPConnection("127.0.0.1", int(port))
            connection.request("GET", "/")
            response = connection.getresponse()
            page = response.read().decode()
            assert response.status == 200 and "<title>Try deperceiver</title>" in page
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
            assert not re.findall(r'(?:src|href)="(?!data:)', page) and str(tiny_run) not in page
            connection.close()
        finally:
            app.send_signal(signal.SIGINT)
            _, log = app.communicate()
    assert app.returncode == 0 and log == ""


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "Either --workdir or --weights is needed"),
        (["--workdir=nowhere"], "nowhere"),
        (["--max_waiting=0"], "--max_waiting is 0; it must be at least 1."),
        (["--max_megapixels=200"], "--max_megapixels is 200; it must be between 1 and 178."),
        (["--timeout=0"], "--timeout is 0; it must be at least 1."),
        (["--score_threshold=2"], "--score_threshold is 2.0; it must be between 0 and 1."),
        (["--port=70000"], "--port is 70000; it must be between 0 and 65535."),
        (["--host=192.0.2.1", "--workdir={0}"], "--host, --port: 192.0.2.1, port 0, cannot be opened: Cannot assign"),
        (["--host=no such host", "--workdir={0}"], "--host, --port: no such host, port 0, cannot be opened: "),
        (["--workdir={0}", "--prot=3"], "There is no flag --prot; the nearest is --port."),
    ],
)
def test_mistakes_are_one_sentence(tiny_run, capsys, arguments, sentence):
    given = [argument.format(tiny_run) for argument in arguments]
    assert run(main, ["app", "--port=0", *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_port_that_is_taken_and_a_library_that_is_missing(tiny_run, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(main, ["app", f"--workdir={tiny_run}", f"--port={port}"]) == 1
    assert f"127.0.0.1, port {port}, cannot be opened: Address already in use." in capsys.readouterr().err
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert run(main, ["app", f"--workdir={tiny_run}"]) == 1
    assert "The app needs uvicorn: pip install '.[app]'." in capsys.readouterr().err

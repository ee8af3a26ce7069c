"""The app on loopback, in a thread of the tests' process, and the browser of the report's tests."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import uvicorn

from deperceiver_jax.app.serve import open_socket, own_names
from deperceiver_jax.app.server import Limits, make_app
from deperceiver_jax.runs.load_detector import load_for_command
from tests.report.conftest import browser  # noqa: F401


@pytest.fixture(scope="session")
def loaded(tiny_run):
    return load_for_command(str(tiny_run), None, "latest", ["app"])[1]


@contextlib.contextmanager
def running(loaded, limits):
    """`port` and `service` of an app."""
    with open_socket("127.0.0.1", 0) as listening:
        app = make_app(loaded, limits, threshold=0.5, hosts=own_names("127.0.0.1"), compile_ahead=False)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield SimpleNamespace(port=listening.getsockname()[1], service=app.state.service)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def app(loaded):
    with running(loaded, Limits(waiting=6, megabytes=2, megapixels=4, seconds=120)) as found:
        yield found


@pytest.fixture(scope="session")
def strict(loaded):
    """One that waits for a second."""
    with running(loaded, Limits(waiting=2, megabytes=1, megapixels=1, seconds=1)) as found:
        yield found

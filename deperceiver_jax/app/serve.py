"""The program: a detector behind a page, until Ctrl-C."""

import contextlib
import importlib.util
import ipaddress
import socket
import warnings
from collections.abc import Sequence

from absl import flags
from PIL import Image

from deperceiver_jax.data.image_header import MOST_PIXELS
from deperceiver_jax.errors import UserError, check_at_least, check_between
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.runs.load_detector import load_for_command

KEEP_ALIVE = 5  # seconds that a connection may be idle, and that answers may take after Ctrl-C
CONNECTIONS = 256  # at one time


def serve(values: flags.FlagValues, config_arguments: Sequence[str]) -> None:
    """values: flags of __main__.py; config_arguments: `--config...`. Raises UserError."""
    missing = [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"The app needs {' and '.join(missing)}: pip install '.[app]'.")
    import uvicorn

    from deperceiver_jax.app.server import Limits, make_app

    limits = Limits(values.max_waiting, values.max_megabytes, values.max_megapixels, values.timeout)
    for name, limit in zip(("max_waiting", "max_megabytes", "max_megapixels", "timeout"), limits, strict=True):
        check_at_least(f"--{name}", limit, 1)
    check_between("--score_threshold", values.score_threshold, 0, 1)
    check_between("--port", values.port, 0, 65535)
    check_between("--max_megapixels", values.max_megapixels, 1, MOST_PIXELS // 1_000_000)
    Image.MAX_IMAGE_PIXELS = values.max_megapixels * 1_000_000
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # such a picture is refused
    with open_socket(values.host, values.port) as listening:
        stored, loaded = load_for_command(values.workdir, values.weights, values.checkpoint, config_arguments)
        keep_compiled(loaded.config.train.compilation_cache)
        hosts = own_names(values.host)
        app = make_app(loaded, limits, threshold=values.score_threshold, hosts=hosts, compile_ahead=True)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                ws="none",
                http="h11",
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=KEEP_ALIVE,
            )
        )
        address = f"[{values.host}]" if ":" in values.host else values.host
        print(f"{stored.items} is at http://{address}:{listening.getsockname()[1]} until Ctrl-C.", flush=True)
        print("Programs for pictures of all shapes are compiled now; until then a picture takes longer.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def open_socket(host: str, port: int) -> socket.socket:
    """Listening. Raises UserError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # behind it Python repeats the address
        raise UserError(f"--host, --port: {host}, port {port}, cannot be opened: {reason}.") from error


def own_names(host: str) -> list[str]:
    """What a request may call this machine: on loopback its own names, so that no other site's name leads here."""
    with contextlib.suppress(ValueError):
        if not ipaddress.ip_address(host).is_loopback:
            return ["*"]
    return [host, "localhost", "127.0.0.1", "[::1]"]

"""Notices at once when another process of a run is gone, however it ended.

Collectives need not: where a process has several devices, one of them may wait for ever for another that has met the
error, and JAX's own heartbeat takes 100 s and ends a process with a stack trace. So each process keeps a silent
connection to the first one, which the operating system closes when either end dies. Who ends in good order says so.
"""

import atexit
import contextlib
import secrets
import socket
import threading
from collections.abc import Callable

FAREWELL = b"."
CONNECT_TIMEOUT = 30  # seconds
GREETING_TIMEOUT = 5  # seconds
_connections: list[socket.socket] = []


def watch(index: int, count: int, share_address: Callable[[str], str], gone: Callable[[str], None], host: str) -> None:
    """Calls `gone` from another thread when a process ends without a farewell.

    share_address: gives every process what the first one passes, "host:port password". host: where the first one is
      found. A stranger who connects, as one that scans a network, does not know the password, and is sent away.
    gone: gets what is known, for people. Raises OSError when the first one cannot be reached.
    """
    if index == 0:
        server, password = _listen(), secrets.token_hex(16)
        share_address(f"{host}:{server.getsockname()[1]} {password}")
        threading.Thread(target=_accept, args=(server, password, count - 1, gone), daemon=True).start()
        return
    address, _, password = share_address("").partition(" ")
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT)
    connection.sendall(f"{password} {index}\n".encode())
    _follow(connection, "process 0", gone)


def part() -> bool:
    """Lets the others notice that this process ends badly, before it does. Returns whether anybody watches."""
    for connection in _connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    return bool(_connections)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(server, password, others, gone):
    with server:
        while others:
            connection, _ = server.accept()
            said, _, index = _greeting(connection).partition(" ")
            if said == password:
                _follow(connection, f"process {index}", gone)
                others -= 1
            else:
                connection.close()


def _greeting(connection) -> str:
    """The first line; nothing where none comes."""
    connection.settimeout(GREETING_TIMEOUT)
    try:
        return connection.makefile("rb", buffering=0).readline(100).decode(errors="replace").strip()
    except OSError:
        return ""


def _follow(connection, who, gone):
    """Waits in a thread for the other side's end, and announces this side's."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that vanished closes nothing

    def wait():
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said != FAREWELL:
            gone(who)

    _connections.append(connection)
    atexit.register(_bid_farewell, connection)
    threading.Thread(target=wait, daemon=True).start()


def _bid_farewell(connection):
    with contextlib.suppress(OSError):  # the other one is gone already
        connection.sendall(FAREWELL)

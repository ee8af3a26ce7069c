"""Notices at once when another process of a run is gone, however it ended.

Collectives need not: where a process has several devices, one of them may wait for ever for another that has met the
error, and JAX's own heartbeat takes 100 s and ends a process with a stack trace. So each process keeps a silent
connection to the first one, which the operating system closes when either end dies. Who ends in good order says so.
"""

import atexit
import contextlib
import socket
import threading
from collections.abc import Callable

FAREWELL = b"."
CONNECT_TIMEOUT = 30  # seconds
_connections: list[socket.socket] = []


def watch(index: int, count: int, share_address: Callable[[str], str], gone: Callable[[str], None], host: str) -> None:
    """Calls `gone` from another thread when a process ends without a farewell.

    share_address: gives every process what the first one passes, "host:port". host: where the first one is found.
    gone: gets what is known, for people. Raises OSError when the first one cannot be reached.
    """
    if index == 0:
        server = _listen()
        share_address(f"{host}:{server.getsockname()[1]}")
        threading.Thread(target=_accept, args=(server, count - 1, gone), daemon=True).start()
        return
    host, _, port = share_address("").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT)
    connection.sendall(f"{index}\n".encode())
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


def _accept(server, others, gone):
    with server:
        for _ in range(others):
            connection, _ = server.accept()
            index = connection.makefile("rb", buffering=0).readline().decode().strip()
            _follow(connection, f"process {index}", gone)


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

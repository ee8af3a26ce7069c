"""A bucket of Google Cloud Storage on loopback: gcp-storage-emulator as a server, and what can go wrong with one."""

import contextlib
import http.server
import io
import logging
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = "bucket"
# It calls a question for what is not there an error.
logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)


class _InMemory(Storage):
    def __init__(self):
        super().__init__(use_memory_fs=True, data_dir="/")

    def _write_config_to_file(self):
        """Nothing outlives the server."""


class Bucket:
    """A running server with one bucket. `variables` lead programs and libraries to it."""

    def __init__(self, port: int, storage: Storage):
        self._storage = storage
        address = f"http://localhost:{port}"
        self.variables = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",  # no search for a machine's own account
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # nor for the kind of the bucket, by gRPC
        }
        self.mend()

    def mend(self) -> None:
        """Everything works and is permitted from here on."""
        self.refused = 0  # requests
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        """Of (method, path of a request): the HTTP status to answer with instead. It may sleep."""
        self.rights: list[str] | None = None  # those that the bucket says it gives; None: whichever it is asked about

    @property
    def url(self) -> str:
        return f"gs://{NAME}"

    def names(self, folder: str = "") -> list[str]:
        """All objects below a folder, by what follows it."""
        return [
            name.removeprefix(folder) for name in list(self._storage.objects.get(NAME, ())) if name.startswith(folder)
        ]

    def delete(self, name: str) -> None:
        """As another client does."""
        self._storage.delete_file(NAME, name)

    def spoil(self, name: str) -> None:
        """What arrives of an object is not what the bucket says of it: another last byte."""
        content = self.read(name)
        self._storage._store.write_bytes(f"{NAME}/{name}", content[:-1] + bytes([content[-1] ^ 1]))

    def read(self, name: str) -> bytes:
        return self._storage.get_file(NAME, name, show_error=False)


@contextlib.contextmanager
def serve_bucket() -> Iterator[Bucket]:
    """A bucket that is gone afterwards."""
    storage = _InMemory()
    create_bucket(NAME, storage)
    storage.buckets[NAME]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}

    class Handler(RequestHandler):
        def __init__(self, *arguments: Any):
            super().__init__(storage, *arguments)

        def parse_request(self):
            """Faults stand before the emulator's own work."""
            if not super().parse_request():
                return False
            moves = "/moveTo/" in self.path  # which the emulator does not know, and libraries ask for five times over
            if status := bucket.fault(self.command, self.path) or (400 if moves else None):
                bucket.refused += 1
                self.rfile = io.BytesIO()
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                self.close_connection = True
                return False
            if bucket.rights is not None and "/iam/testPermissions" in self.path:
                self.path = (
                    f"{self.path.partition('?')[0]}?{urllib.parse.urlencode({'permissions': bucket.rights}, True)}"
                )
            return True

        def end_headers(self):
            """Google's say which version of an object they carry, which TensorStore asks for."""
            if match := re.search(rf"/b/{NAME}/o/([^?]+)\?.*alt=media", self.path) if self.command == "GET" else None:
                if found := storage.objects.get(NAME, {}).get(urllib.parse.unquote(match[1])):
                    self.send_header("x-goog-generation", found["generation"])
            super().end_headers()

    class Server(http.server.HTTPServer):
        def handle_error(self, request, client_address):
            """A client that was killed, or asked two things and is content with one answer, is no error."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    with Server(("localhost", 0), Handler) as server:
        bucket = Bucket(server.server_port, storage)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield bucket
        finally:
            server.shutdown()
            thread.join()

"""A hub of models on this machine: what huggingface_hub asks of one, and ways in which it may fail."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from urllib.parse import unquote


class Hub(http.server.ThreadingHTTPServer):
    """Serves `models`: {owner/name: {revision: {file: bytes}}}; requests are noted in `asked`.

    cut: after so many bytes of a large file the connection is closed, and `cuts` times at once when it is gone on with.
    forged: large files come with their last byte changed.
    """

    def __init__(self, models: Mapping[str, Mapping[str, Mapping[str, bytes]]]):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.models, self.asked = models, list[str]()
        self.cut, self.cuts, self.forged = 0, 0, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def commit(model: str, revision: str) -> str:
    return hashlib.sha1(f"{model}@{revision}".encode()).hexdigest()


def is_large(file: str) -> bool:
    """Whether the hub keeps a file in LFS, where its name is its SHA-256; others are git's blobs."""
    return file.endswith((".safetensors", ".bin"))


def name_of(file: str, content: bytes) -> str:
    if is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._refuse("EntryNotFound")

    def _files(self, model, revision):
        """(files, commit), or None and what is missing."""
        revisions = self.server.models.get(model)
        if revisions is None:
            return None, "RepoNotFound"
        for name, files in revisions.items():
            if revision in (name, commit(model, name)):
                return files, commit(model, name)
        return None, "RevisionNotFound"

    def _api(self, model, question, revision):
        files, sha = self._files(model, revision)
        if files is None:
            self._refuse(sha)
        elif question == "revision":
            self._json({"_id": "0", "id": model, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        else:
            entries = []
            for file, content in files.items():
                entry = {"type": "file", "path": file, "size": len(content), "oid": name_of(file, content)}
                if is_large(file):
                    lfs = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
                    entry |= {"oid": hashlib.sha1(content).hexdigest(), "lfs": lfs}
                entries.append(entry)
            self._json(entries)

    def _json(self, content):
        body = json.dumps(content).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, model, revision, file):
        files, sha = self._files(model, revision)
        if files is None or file not in files:
            self._refuse(sha if files is None else "EntryNotFound")
            return
        content = files[file]
        etag = f'"{name_of(file, content)}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "X-Linked-ETag": etag, "X-Linked-Size": len(content)}
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if is_large(file) and self.server.forged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self._head(206 if start else 200, headers | {"Content-Length": len(body)})
        if self.command == "HEAD":
            return
        if is_large(file) and self.server.cut and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(body[: self.server.cut] if not start else b"")
            self.close_connection = True
            return
        self.wfile.write(body)

    def _refuse(self, what):
        self._head(404, {"X-Error-Code": what, "X-Error-Message": what, "Content-Length": 0})

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

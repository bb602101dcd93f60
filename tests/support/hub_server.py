"""A Hugging Face hub on this machine: the endpoints that an upload and a download use.

It speaks the API as huggingface_hub's client calls it, keeps what it is sent, and checks metadata
of cards by that library. One token may write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by id, their branches with files, and the objects of large files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        """The address to give as endpoint."""
        return f"http://127.0.0.1:{self.server_port}"


class Endpoint(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer a call of the API, or of LFS."""
        length = int(self.headers["Content-Length"])
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(length)
        self.server.calls.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, call in CALLS.items():
            if match := re.fullmatch(pattern, path):
                return call(self, body, *match.groups())
        return self.answer(404, {"error": f"no endpoint {path}"})

    def do_PUT(self) -> None:
        """Keep the object of a large file, if it is the one that was announced."""
        name = self.path.rsplit("/", 1)[1]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(body).hexdigest() != name:
            return self.answer(400, {"error": "another object"})
        self.server.objects[name] = body
        return self.answer(200, {})

    def do_GET(self) -> None:
        """Send a file, or the facts of a repository."""
        path = unquote(urlsplit(self.path).path)
        self.server.calls.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            if match[1] not in self.server.private:
                return self.answer(404, {"error": "Repository not found"})
            facts = {"id": match[1], "private": self.server.private[match[1]], "sha": COMMIT}
            return self.answer(200, facts)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        branches = self.server.branches.get(match[1], {}) if match else {}
        branch = "main" if match and match[2] == COMMIT else match[2] if match else ""
        body = branches.get(branch, {}).get(match[3] if match else "")
        if body is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self.send(200, body, {"ETag": etag, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def create(self, body: bytes) -> None:
        """Create a repository; 409 if there is one."""
        call = json.loads(body)
        name = f"{call.get('organization') or 'me'}/{call['name']}"
        if name in self.server.private:
            return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        self.server.private[name] = call.get("visibility") == "private" or bool(
            call.get("private")  # of clients before 2.0
        )
        self.server.branches[name] = {"main": {}}
        return self.answer(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        """Create a branch."""
        self.server.branches[name][branch] = {}
        return self.answer(201, {})

    def validate(self, body: bytes) -> None:
        """Check a card's metadata."""
        from huggingface_hub import ModelCard

        try:
            ModelCard(json.loads(body)["content"])
        except ValueError as error:
            return self.answer(400, {"errors": [{"message": str(error)}]})
        return self.answer(200, {"warnings": [], "errors": []})

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        """Say which files are large."""
        if branch not in self.server.branches.get(name, {}):
            return self.answer(404, {"error": "Revision not found"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.answer(200, {"files": files})

    def batch(self, body: bytes, _: str) -> None:
        """Say where large files are to be put."""
        objects = [
            item | {"actions": {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        """Put the files of a commit into a branch."""
        files = self.server.branches[name][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def answer(self, code: int, plain: object, headers: dict[str, str] | None = None) -> None:
        """Send JSON."""
        self.send(code, json.dumps(plain).encode(), headers or {})

    def send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        """Send bytes, or their headers alone."""
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


CALLS = {
    r"/api/repos/create": Endpoint.create,
    r"/api/validate-yaml": Endpoint.validate,
    r"/api/models/([^/]+/[^/]+)/branch/(.+)": Endpoint.branch,
    r"/api/models/([^/]+/[^/]+)/preupload/(.+)": Endpoint.preupload,
    r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": Endpoint.batch,
    r"/api/models/([^/]+/[^/]+)/commit/(.+)": Endpoint.commit,
}


@contextmanager
def serve() -> Iterator[Hub]:
    """Context manager of a hub that answers until its end."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

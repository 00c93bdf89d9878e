"""A hub of one repository on this machine, for huggingface_hub to talk to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO, COMMIT = "org/model", "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": []}',
    "model.safetensors": bytes(300_000),
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
}


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def log_message(self, *args: object) -> None: ...

    def _reply(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        file = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if path in (f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/revision/v1"):
            self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode(), with_body)
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            tree = [{"type": "file", "path": f, "size": len(data), "oid": f} for f, data in FILES.items()]
            self._send(json.dumps(tree).encode(), with_body)
        elif file in FILES:
            self._send(FILES[file], with_body)
        else:
            code = "RevisionNotFound" if path.startswith(f"/api/models/{REPO}/") else "RepoNotFound"
            self._send(b"{}", with_body, status=404, error=code)

    def _send(self, body: bytes, with_body: bool, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(body)}-{hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextmanager
def serve_hub() -> Iterator[str]:
    """Yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()

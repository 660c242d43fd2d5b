"""A stand-in for the hub: one model, its files, and connections that break."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HUB_ID = "org/name"
COMMIT = "c" * 40
RESOLVED = re.compile(rf"/{HUB_ID}/resolve/[^/]+/(.+)")
RANGE = re.compile(r"bytes=(\d+)-")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{HUB_ID}/tree/"):
            self._send(json.dumps(self.server.tree()).encode(), {})
        elif path.startswith(f"/api/models/{HUB_ID}"):
            self._send(json.dumps(self.server.facts()).encode(), {})
        elif (found := RESOLVED.fullmatch(path)) and found[1] in self.server.files:
            self._file(found[1], self.server.files[found[1]])
        else:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def _file(self, name: str, content: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if self.command == "GET":
            asked = RANGE.match(self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            self.server.starts.setdefault(name, []).append(start)
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if name in self.server.broken:
                self.server.broken.remove(name)
                self._send(content, headers, cut=len(content) // 2)
                return
            self._send(content[start:], headers, 206 if start else 200)
            return
        self._send(content, headers)

    def _send(
        self, data: bytes, headers: Mapping[str, str], status: int = 200, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None


class Hub(ThreadingHTTPServer):
    """Serves `files`; the first download of one in `broken` ends in its middle."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], broken: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.broken = files, broken
        self.sizes: dict[str, int] = {}  # what it claims, where that is not true
        self.starts: dict[str, list[int]] = {}  # by file: first byte of each download

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def facts(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": self.sizes.get(name, len(content))}
            for name, content in self.files.items()
        ]
        return {"id": HUB_ID, "modelId": HUB_ID, "sha": COMMIT, "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.files.items()
        ]


@contextmanager
def stand_in_hub(files: Mapping[str, bytes], broken: set[str] | None = None) -> Iterator[Hub]:
    """The hub on a free port, in a thread."""
    with Hub(files, broken or set()) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

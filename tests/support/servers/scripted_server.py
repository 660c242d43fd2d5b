"""A server that streams prepared completions, in this process or as one of its own.

As a process: `python scripted_server.py PORT TEXT`, where TEXT is what it says, word by word.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE, NO_USAGE, REFUSAL = "usage", "no usage", "refusal"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        if self.server.manner == REFUSAL:
            self._reply(429, {"error": "busy"})
        else:
            self._stream(body["max_tokens"])

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        self._write(status, json.dumps(content).encode())

    def _write(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-1])
        if self.command == "POST":  # over before its client, which has all but the end, goes on
            with self.server.lock:
                self.server.open -= 1
        self.wfile.write(data[-1:])

    def _stream(self, num_tokens: int) -> None:
        words = self.server.text.split(" ")
        events: list[dict[str, Any]] = [
            {"choices": [{"text": f"{words[i % len(words)]} ", "finish_reason": None}]}
            for i in range(num_tokens)
        ]
        events.append({"choices": [{"text": "", "finish_reason": "length"}]})
        if self.server.manner == USAGE:
            events.append({"choices": [], "usage": {"completion_tokens": num_tokens}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._write(200, "".join([*lines, "data: [DONE]\n\n"]).encode())


class ScriptedServer(ThreadingHTTPServer):
    """Records what it was asked, and how many requests were open at the same time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, text: str, manner: str = USAGE) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.text, self.manner = text, manner
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def scripted(text: str = "one two three", manner: str = USAGE) -> Iterator[ScriptedServer]:
    """The server on a free port, in a thread."""
    with ScriptedServer(0, text, manner) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    ScriptedServer(int(sys.argv[1]), sys.argv[2]).serve_forever()

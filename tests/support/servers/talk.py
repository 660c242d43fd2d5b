"""A chat whose terminal is a string, and a server whose answers are given."""

from __future__ import annotations

import io
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from rich.console import Console

from server.terminal.remote import Remote
from server.terminal.session import Session
from tests.support.waiting import DEADLINE

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, with a reset


class Talk:
    """A session whose terminal is a string."""

    def __init__(self, url: str, key: str | None = None, terminal: bool = True) -> None:
        self._screen = io.StringIO()
        colours = "truecolor" if terminal else None
        console = Console(
            file=self._screen, force_terminal=terminal, color_system=colours, width=200
        )
        self.session = Session(Remote(url, key), "tiny", console)

    def say(self, *lines: str) -> str:
        """What is printed after these lines."""
        before = len(self._screen.getvalue())
        left = iter(lines)

        def read() -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        self.session.run(read)
        return self._screen.getvalue()[before:]


class GivenServer:
    """Answers each request with the next of `bodies`, the last one ever again, as a context
    manager; `url` is where. `missing`: bytes that it promises beside, before it resets."""

    def __init__(self, *bodies: bytes, status: int = 200, missing: int = 0) -> None:
        left = list(bodies)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = left.pop(0) if len(left) > 1 else left[0]
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(status)
                self.send_header("content-length", str(len(body) + missing))
                self.end_headers()
                self.wfile.write(body)
                if missing:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    self.connection.close()

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join(DEADLINE)
        self._server.server_close()


def stream(*data: str) -> bytes:
    """A stream of server-sent events to its proper end."""
    return "".join(f"data: {each}\n\n" for each in (*data, "[DONE]")).encode()

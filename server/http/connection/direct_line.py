"""From a route to its connection, past everything between them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

LINE = "aerie.line"  # key in the ASGI scope


class Departures:
    """Pieces of all streams of one server, which are written together, after the message of the
    engine that they come from. If each were written at once, its reader would run on this machine
    and take the processor and its caches from those who make the other pieces."""

    def __init__(self) -> None:
        self._waiting: list[tuple[RequestResponseCycle, bytes]] = []

    def add(self, cycle: RequestResponseCycle, data: bytes) -> None:
        """Write `data` to the connection of `cycle` in the next turn of the running loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.leave)
        self._waiting.append((cycle, data))

    def leave(self) -> None:
        """Write now: called before anything else is written. May be repeated."""
        waiting, self._waiting = self._waiting, []
        for cycle, data in waiting:
            if not (cycle.disconnected or cycle.transport.is_closing()):
                cycle.transport.write(data)


class DirectLine:
    """Writes further pieces of a body that has begun. What the layers of the application do to the
    first piece they have done; to the others they do nothing, one after the other."""

    def __init__(self, cycle: RequestResponseCycle, departures: Departures) -> None:
        self._cycle = cycle
        self._departures = departures
        self._flow: FlowControl = cycle.flow

    @property
    def is_open(self) -> bool:
        """Whether a piece can be written now: the response has begun, its length is not known
        before, and its client reads."""
        cycle = self._cycle
        return (
            cycle.response_started
            and cycle.chunked_encoding is True
            and not self._flow.write_paused
            and not cycle.response_complete
            and not cycle.disconnected
        )

    def write(self, data: bytes) -> None:
        """One chunk of the body. Only while the line is open; `data` is not empty."""
        self._departures.add(self._cycle, b"%x\r\n%b\r\n" % (len(data), data))


def line_of(scope: Scope) -> DirectLine | None:
    """The line to the client of this request; None without a connection of ours."""
    line = scope.get(LINE)
    assert line is None or isinstance(line, DirectLine)
    return line

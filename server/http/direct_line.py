"""From a route to its connection, past everything between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

LINE = "aerie.line"  # key in the ASGI scope


class DirectLine:
    """Writes further pieces of a body that has begun. What the layers of the application do to the
    first piece they have done; to the others they do nothing, one after the other."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
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
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def line_of(scope: Scope) -> DirectLine | None:
    """The line to the client of this request; None without a connection of ours."""
    line = scope.get(LINE)
    assert line is None or isinstance(line, DirectLine)
    return line

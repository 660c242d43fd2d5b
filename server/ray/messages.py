"""What the front end and the engines say to each other, besides engine.messages."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.messages import DraftSwapped, EngineInfo, EngineStats, Finished, Tokens
from engine.request import Request


class Head(msgspec.Struct, frozen=True):
    """The draft head that an administrator chose last; `version` grows with every choice, and is 0
    for the configured head."""

    version: float = 0.0  # seconds of time.time()
    path: str | None = None


class EngineStatus(msgspec.Struct, frozen=True):
    """An engine as it is now."""

    engine_id: str  # of this start of this engine
    info: EngineInfo
    stats: EngineStats | None
    head: Head


class Route(msgspec.Struct, frozen=True):
    """What the router knows of a request."""

    request_id: str
    chain: tuple[bytes, ...] = ()
    session: str = ""


_encode = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(Request)
_events = msgspec.msgpack.Decoder(list[Tokens | Finished])
_status = msgspec.msgpack.Decoder(EngineStatus)
_swapped = msgspec.msgpack.Decoder(DraftSwapped)
_route = msgspec.msgpack.Decoder(Route)


def encode(message: Any) -> bytes:
    """One message, or a list of events."""
    return _encode(message)


def decode_request(frame: bytes) -> Request:
    return _request.decode(frame)


def decode_events(frame: bytes) -> list[Tokens | Finished]:
    return _events.decode(frame)


def decode_status(frame: bytes) -> EngineStatus:
    return _status.decode(frame)


def decode_swapped(frame: bytes) -> DraftSwapped:
    return _swapped.decode(frame)


def decode_route(frame: bytes) -> Route:
    return _route.decode(frame)

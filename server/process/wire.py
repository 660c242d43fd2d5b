"""The format between the two processes: batches of msgpack messages over a ZeroMQ pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from engine.messages import ClientMessage, EngineMessage

_encoder = msgspec.msgpack.Encoder()
_client_batch = msgspec.msgpack.Decoder(list[ClientMessage])
_engine_batch = msgspec.msgpack.Decoder(list[EngineMessage])


def encode(batch: Sequence[ClientMessage] | Sequence[EngineMessage]) -> bytes:
    """One frame for a batch of messages, in order."""
    return _encoder.encode(batch)


def decode_client(frame: bytes) -> list[ClientMessage]:
    """A batch that the HTTP process sent."""
    return _client_batch.decode(frame)


def decode_engine(frame: bytes) -> list[EngineMessage]:
    """A batch that the engine process sent."""
    return _engine_batch.decode(frame)


def unbounded(socket: zmq.Socket[Any]) -> None:
    """Queue without a limit (admission bounds the requests); drop the queue when closed."""
    socket.set_hwm(0)
    socket.linger = 0

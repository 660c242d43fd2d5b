"""The format between the two processes: batches of msgpack messages over a ZeroMQ pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from engine.messages import ClientMessage, EngineMessage, OtherChoice, Submit
from engine.request import Request

_encoder = msgspec.msgpack.Encoder()
_client_batch = msgspec.msgpack.Decoder(list[ClientMessage])
_engine_batch = msgspec.msgpack.Decoder(list[EngineMessage])


def encode(batch: Sequence[ClientMessage] | Sequence[EngineMessage]) -> bytes:
    """One frame for a batch of messages, in order."""
    return _encoder.encode(batch)


def share_prompts(batch: Sequence[ClientMessage]) -> list[ClientMessage]:
    """The same messages, with adjacent choices of one request as one `Submit`, so that their prompt
    is sent once. Choices have the very same list of prompt ids."""
    found: list[ClientMessage] = []
    for message in batch:
        last = found[-1] if found else None
        if (
            isinstance(message, Submit)
            and isinstance(last, Submit)
            and not message.others
            and _is_new(last)
            and _is_new(message)
            and last.reserve == message.reserve
            and _differ_as_choices(last.request, message.request)
        ):
            one = message.request
            choice = OtherChoice(one.request_id, one.params.seed, one.choice)
            found[-1] = Submit(last.request, (*last.others, choice), reserve=last.reserve)
        else:
            found.append(message)
    return found


def _is_new(message: Submit) -> bool:
    """Whether it differs from others for the same prompt by nothing but its choices."""
    return not message.output_ids and message.handover is None


def _differ_as_choices(first: Request, other: Request) -> bool:
    return first.prompt_ids is other.prompt_ids and _common(first) == _common(other)


def _common(request: Request) -> Request:
    """What all choices of a request share, without its prompt."""
    replace = msgspec.structs.replace
    params = replace(request.params, seed=0)
    return replace(request, request_id="", prompt_ids=[], choice=0, params=params)


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

"""Responses that are kept: what they were asked with, what they say, and what follows them."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from server.http.context import ServerContext
from server.http.errors import ApiError, bad_value, invalid
from server.http.reply.kept import Kept
from server.openai.responses.bodies import ResponseObject, Status
from server.openai.responses.items import SYSTEM, InputItem
from server.openai.responses.request import InputTokensRequest, ResponsesRequest

PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
}
NO_OUTPUT = b'{"status": "completed", "background": false, "output": []}'
HAS_OUTPUT: Sequence[Status] = ("completed", "incomplete")


class Head(msgspec.Struct, frozen=True):
    """What is read of a kept response."""

    status: Status
    background: bool
    output: list[Any]


def head_of(kept: Kept) -> Head:
    return msgspec.json.decode(kept.answer, type=Head)


def not_found(id: str, param: str | None = None) -> ApiError:
    """404: it never was, is forgotten, or belongs to another key."""
    message = f"No response {id[:64]!r} is stored: it may be forgotten, as there is little room"
    return ApiError(404, message, "invalid_request_error", param=param, code="response_not_found")


def kept_response(context: ServerContext, owner: str, id: str) -> Kept:
    """The response. ApiError 404 if it is not kept."""
    found = context.kept.get(owner, id)
    if found is None:
        raise not_found(id)
    return found


def line_before(context: ServerContext, owner: str, request: InputTokensRequest) -> list[Kept]:
    """The responses that a request goes on after, the oldest first.

    Raises:
        ApiError: 404; one of them is not kept.
    """
    if request.previous_response_id is None:
        return []
    try:
        return context.kept.line(owner, request.previous_response_id)
    except KeyError as error:
        raise not_found(error.args[0], "previous_response_id") from error


def bounded_line(line: list[Kept], limit: int, may_shorten: bool) -> list[Kept]:
    """As many of the newest responses as have `limit` bytes, and of the first one's request the
    system messages at its start.

    Raises:
        ApiError: 400; it is more than that, and must not be shortened.
    """
    total, kept_from = 0, len(line)
    while kept_from and (total := total + line[kept_from - 1].num_bytes) <= limit:
        kept_from -= 1
    if kept_from == 0:
        return line
    if not may_shorten:
        raise _line_too_long(limit)
    is_system = lambda item: item.get("role") in SYSTEM  # noqa: E731
    lead = list(itertools.takewhile(is_system, msgspec.json.decode(line[0].asked)))
    first = dataclasses.replace(line[0], asked=msgspec.json.encode(lead), answer=NO_OUTPUT)
    return [first, *line[kept_from:]]


def _line_too_long(limit: int) -> ApiError:
    """400: a conversation is longer than what one request could hold."""
    return invalid(
        f"The conversation before has more than {limit} bytes of JSON (server.max_body_bytes): "
        'begin a new one, or let truncation "auto" leave out its oldest turns',
        "previous_response_id",
        "context_length_exceeded",
    )


def items_of(line: Sequence[Kept]) -> list[InputItem]:
    """All items of a conversation. ApiError 400 if its last response has no output so far."""
    found: list[InputItem] = []
    for kept in line:
        head = head_of(kept)
        if head.status not in HAS_OUTPUT and kept is line[-1]:
            wanted = " or ".join(HAS_OUTPUT)
            raise bad_value(
                "previous_response_id", head.status, f"the status of this response must be {wanted}"
            )
        items = [*msgspec.json.decode(kept.asked), *head.output]
        found += [InputItem.model_validate(item) for item in items]
    return found


def kept_items(request: ResponsesRequest) -> bytes:
    """The items of a request as JSON, each with an id, and its content as parts."""
    return msgspec.json.encode([_kept_item(item) for item in request.items])


def _kept_item(item: InputItem) -> dict[str, Any]:
    found = item.model_dump(exclude_none=True)
    kind = "output_text" if item.role == "assistant" else "input_text"
    if isinstance(item.content, str):
        found["content"] = [{"type": kind, "text": item.content}]
    new = {"id": PREFIXES[item.type] + uuid.uuid4().hex, "status": "completed", "type": item.type}
    return new | found


def keep(
    context: ServerContext, owner: str, before: str | None, asked: bytes, response: ResponseObject
) -> None:
    """Keep a response, or its newest state."""
    kept = Kept(owner, before, asked, msgspec.json.encode(response))
    context.kept.put(response.id, kept)

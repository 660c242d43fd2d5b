"""Responses that are kept: what they were asked with, what they say, and what follows them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from server.http.context import ServerContext
from server.http.errors import ApiError, bad_value
from server.http.kept import Kept
from server.openai.responses.bodies import ResponseObject, Status
from server.openai.responses.items import InputItem
from server.openai.responses.request import ResponsesRequest

PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
}
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


def line_before(context: ServerContext, owner: str, request: ResponsesRequest) -> list[Kept]:
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

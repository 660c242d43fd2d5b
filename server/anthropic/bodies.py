"""Messages, events and errors as msgspec structs; their JSON is the wire format."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.http.errors import ApiError, ErrorManner
from server.openai.reply.bodies import SpeculationStats

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class TextOutput(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingOutput(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUse(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextOutput | ThinkingOutput | ToolUse


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens. Those of the prompt that were cached are not in `input_tokens`; in message_start,
    before this is known, all are."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessageReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    speculation: SpeculationStats | UnsetType = UNSET


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream; which fields it has follows from its type."""

    type: str
    message: MessageReply | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: OutputBlock | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET
    speculation: SpeculationStats | UnsetType = UNSET


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int


class MessagesErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    message: str


class MessagesError(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every response of these routes that is not a success."""

    type: Literal["error"] = "error"
    error: MessagesErrorDetail
    request_id: str | UnsetType = UNSET


def error_of(error: ApiError, request_id: str | UnsetType = UNSET) -> MessagesError:
    """An error in Anthropic's words."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    detail = MessagesErrorDetail(type=TYPES.get(error.status, other), message=error.detail.message)
    return MessagesError(error=detail, request_id=request_id)


MANNER = ErrorManner("request-id", lambda error, id: msgspec.json.encode(error_of(error, id)))

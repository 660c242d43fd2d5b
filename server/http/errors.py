"""Errors, in OpenAI's format unless an API has its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel

MAX_SHOWN = 60  # characters of an offending value in a message


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response; routes raise it."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, type, param, code)
        self.headers = headers or {}

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))


@dataclass(frozen=True, slots=True)
class ErrorManner:
    """How the routes of an API tell of errors."""

    id_header: str  # another name of x-request-id
    body: Callable[[ApiError, str], bytes]  # of an error, and the id of its request


OPENAI = ErrorManner("x-request-id", lambda error, _: error.body())


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is invalid; sending it again does not help."""
    return ApiError(400, message, "invalid_request_error", param=param, code=code)


def bad_value(param: str, value: Any, allowed: str) -> ApiError:
    """400 for one field: names the field, its value and the allowed values."""
    return invalid(f"{param} is {shorten(value)}: {allowed}", param)


def unknown_field(name: str) -> ApiError:
    """400: fields that would be ignored are refused."""
    shown = name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…"
    return invalid(f"Unknown field {shorten(shown)}", shown, "unknown_field")


def context_overflow(max_model_len: int, requested: str, param: str) -> ApiError:
    """400 with the wording by which clients recognise too long a request."""
    message = f"This model's maximum context length is {max_model_len} tokens. However, {requested}"
    return invalid(message, param, "context_length_exceeded")


def model_not_found(name: str) -> ApiError:
    message = f"The model {shorten(name)} does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, "invalid_request_error", param="model", code="model_not_found")


def rate_limited(message: str, retry_after: int, closes: bool = False) -> ApiError:
    """429: try again after `retry_after` seconds. `closes`: on another connection, because the rest
    of this request is not read."""
    headers = {"retry-after": str(retry_after)} | ({"connection": "close"} if closes else {})
    code = "rate_limit_exceeded"
    return ApiError(429, message, "rate_limit_error", code=code, headers=headers)


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    """503: the server accepts no requests now."""
    headers = {"retry-after": str(retry_after)}
    return ApiError(503, message, "unavailable_error", code=code, headers=headers)


def server_error(message: str) -> ApiError:
    """500: a fault of the server. `message` must not show internals."""
    return ApiError(500, message, "server_error", code="internal_error")


def shorten(value: Any) -> str:
    """A JSON value for a message: at most about MAX_SHOWN characters."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "…"
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict | BaseModel):
        return "an object"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return json.dumps(value)

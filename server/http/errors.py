"""Errors in OpenAI's format, and how invalid requests are turned into them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

RULE = "broken_rule"
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


def validation_error(error: ValidationError, body: Any) -> ApiError:
    """The pydantic errors of `body` as one 400, about the most deeply nested invalid field.

    Every branch of a union reports an error; errors of one field are joined by "or".
    """
    entries = error.errors(include_url=False)
    found = [(_path(_location(entry), body, entry["type"]), entry) for entry in entries]
    path, entry = max(found, key=lambda pair: len(pair[0]))
    param = _written(path)
    if entry["type"] == "extra_forbidden":
        return unknown_field(param)
    if entry["type"] == "missing":
        return invalid(f"{param} is missing: it is required", param)
    allowed = " or ".join(dict.fromkeys(_allowed(other) for where, other in found if where == path))
    if entry["type"] == RULE:
        return invalid(allowed, param)
    if not path:
        return invalid(f"The request is {shorten(entry['input'])}: {allowed}")
    return bad_value(param, entry["input"], allowed)


def broken_rule(param: str, message: str) -> PydanticCustomError:
    """The error of a validator for fields that contradict each other; `param` is reported."""
    return PydanticCustomError(RULE, "{message}", {"message": message, "param": param})


def _location(entry: ErrorDetails) -> tuple[int | str, ...]:
    blamed = (entry["ctx"]["param"],) if entry["type"] == RULE else ()
    return entry["loc"] + blamed


def shorten(value: Any) -> str:
    """A JSON value for a message: at most about MAX_SHOWN characters."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "…"
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return json.dumps(value)


def _path(loc: Sequence[int | str], body: Any, kind: str) -> list[int | str]:
    """`loc` without the names of union branches, which are not in the client's request."""
    path: list[int | str] = []
    for index, step in enumerate(loc):
        known = isinstance(body, dict) and step in body
        if isinstance(body, list) and isinstance(step, int) and step < len(body):
            known = True
        if known:
            body = body[step]
            path.append(step)
        elif kind in ("missing", RULE) and index == len(loc) - 1:
            path.append(step)
    return path


def _written(path: Sequence[int | str]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _allowed(entry: ErrorDetails) -> str:
    message = str(entry["msg"]).removeprefix("Value error, ")
    return "it" + message.removeprefix("Input") if message.startswith("Input ") else message
